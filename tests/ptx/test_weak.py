"""The memory model: what a thread may see of another's stores, on litmus tests with many schedules."""

import contextlib
import dataclasses

import numpy as np
import pytest

from .faults import Fault
from .schedule import Decision, Schedule, shrink
from .snippets import launch
from .tensors import Allowed

SEEDS = range(40)
RACES = [
    Allowed(name, frozenset(pair), "a litmus test")
    for name in "ab"
    for pair in ({"relaxed load", "weak store"}, {"weak load", "weak store"}, {"relaxed load", "relaxed store"})
]
# Program 0 stores to a, then to b; program 1 loads b, then a, into c; one thread each
PASSING = """
setp.eq.b32 %p1, %r2, 0;
setp.eq.b32 %p2, %r1, 0;
mov.b32 %r3, 1;
and.pred %p3, %p1, %p2;
not.pred %p4, %p1;
and.pred %p5, %p4, %p2;
@%p3 ST_DATA [%rd1], %r3;
AFTER
@%p3 ST_FLAG [%rd2], %r3;
@%p5 LD_FLAG %r5, [%rd2];
BEFORE
@%p5 LD_DATA %r6, [%rd1];
@%p5 st.global.b32 [%rd3], %r5;
@%p5 st.global.b32 [%rd3+4], %r6;
"""
PLAIN = {"ST_DATA": "st.global.b32", "ST_FLAG": "st.relaxed.gpu.global.b32", "LD_FLAG": "ld.relaxed.gpu.global.b32"}
PLAIN |= {"LD_DATA": "ld.global.b32", "AFTER": "", "BEFORE": ""}
RELEASE, ACQUIRE = "st.release.gpu.global.b32", "ld.acquire.gpu.global.b32"
FENCE = "fence.acq_rel.gpu;"


def words(n):
    return np.zeros(n, np.uint32)


def passed(seed, allowed=(), weak=True, **changes):
    """What program 1 saw of the flag and of the data."""
    body = PASSING
    for name, opcode in (PLAIN | changes).items():
        body = body.replace(name, opcode)
    out = words(2)
    launch(body, words(1), words(1), out, programs=2, schedule=Schedule(seed, weak), allowed=list(allowed))
    return tuple(out.tolist())


@pytest.mark.parametrize(
    "changes",
    [
        dict(ST_FLAG=RELEASE, LD_FLAG=ACQUIRE),
        dict(AFTER=FENCE, LD_FLAG=ACQUIRE),
        dict(AFTER=FENCE, BEFORE=FENCE),
        dict(AFTER="@%p3 membar.gl;", BEFORE="@%p5 membar.gl;"),
        dict(AFTER="@%p3 fence.sc.sys;", BEFORE=FENCE),
        dict(ST_FLAG=RELEASE, BEFORE=FENCE),
        dict(ST_FLAG="st.release.sys.global.b32", LD_FLAG=ACQUIRE),
    ],
)
def test_a_message_that_is_passed_on(changes):
    """Seeing the flag means seeing the data; loads that do not see the flag race with the store of the data."""
    seen = set()
    for seed in SEEDS:
        with contextlib.suppress(Fault):
            seen.add(passed(seed, **changes))
    assert seen - {(0, 1)} == {(1, 1)}
    assert (0, 1) not in seen or "membar" in changes["BEFORE"]  # two fences.sc are ordered whatever was seen
    assert {passed(seed, RACES, **changes) for seed in SEEDS} <= {(0, 0), (0, 1), (1, 1)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(ST_FLAG=RELEASE),
        dict(LD_FLAG=ACQUIRE),
        dict(AFTER=FENCE),
        dict(BEFORE=FENCE),
        dict(ST_FLAG=RELEASE.replace("gpu", "cta"), LD_FLAG=ACQUIRE),
        dict(ST_FLAG=RELEASE, LD_FLAG=ACQUIRE.replace("gpu", "cta")),
        dict(AFTER="fence.acq_rel.cta;", BEFORE=FENCE),
        dict(AFTER="@%p3 membar.cta;", BEFORE="@%p5 membar.gl;"),
        dict(AFTER="bar.sync 0;", BEFORE="bar.sync 0;"),
        dict(AFTER=FENCE, ST_FLAG="st.global.b32", BEFORE=FENCE),  # a weak store carries no fence
        dict(ST_FLAG=RELEASE, BEFORE=FENCE, LD_FLAG="ld.global.cg.b32"),
    ],
)
def test_a_message_that_gets_lost(changes):
    """The data may still be old, and the race is reported."""
    others = [
        Allowed("b", frozenset({f"{load} load", f"{store} store"}), "a litmus test")
        for load in ("weak", "relaxed", "acquire", "acquire.cta")
        for store in ("relaxed", "release", "release.cta")
    ]
    assert (1, 0) in {passed(seed, RACES + others, **changes) for seed in range(150)}
    for seed in range(6):
        with pytest.raises(Fault, match="a race on a"):
            passed(seed, others, **changes)


def test_sequentially_consistent_memory_keeps_the_order():
    assert {passed(seed, RACES, weak=False) for seed in SEEDS} <= {(0, 0), (0, 1), (1, 1)}


BUFFERING = """
setp.eq.b32 %p1, %r1, 0;
mul.wide.u32 %rd9, %r2, 4;
xor.b32 %r4, %r2, 1;
mul.wide.u32 %rd8, %r4, 4;
add.s64 %rd7, %rd1, %rd9;
add.s64 %rd6, %rd1, %rd8;
add.s64 %rd5, %rd2, %rd9;
mov.b32 %r3, 1;
@%p1 st.relaxed.gpu.global.b32 [%rd7], %r3;
@%p1 ld.relaxed.gpu.global.b32 %r5, [%rd6];
@%p1 st.global.b32 [%rd5], %r5;
"""


@pytest.mark.parametrize("scope", ["cta", "gpu"])
def test_a_scope_is_that_of_each_element(scope):
    """A program loads two words at once, one that it stored itself, and one of the other program."""
    body = "xor.b32 %r3, %r2, 1;\nmul.wide.u32 %rd9, %r3, 4;\nadd.s64 %rd8, %rd1, %rd9;\nsetp.eq.b32 %p1, %r1, 0;\n"
    body += f"@%p1 st.relaxed.{scope}.global.b32 [%rd8], %r2;\nsetp.eq.b32 %p2, %r1, 1;\nsetp.eq.b32 %p3, %r2, 1;\n"
    body += f"and.pred %p2, %p2, %p3;\n@%p2 ld.relaxed.{scope}.global.v2.b32 {{%r4, %r5}}, [%rd1];"
    with pytest.raises(Fault, match="a race on a, element 1") if scope == "cta" else contextlib.nullcontext():
        launch(body, words(2), programs=2)


@pytest.mark.parametrize("weak", [False, True])
def test_stores_may_be_buffered(weak):
    """Both programs store and then look at the other's: neither sees it only in weak memory."""
    seen = set()
    for seed in range(150):
        out = words(2)
        launch(BUFFERING, words(2), out, programs=2, schedule=Schedule(seed, weak))
        seen.add(tuple(out.tolist()))
    assert ((0, 0) in seen) == weak and (1, 1) in seen


@pytest.mark.parametrize("fence", ["fence.sc.gpu", "membar.gl", "fence.acq_rel.gpu", "fence.sc.cta"])
def test_only_fences_that_are_sequentially_consistent_empty_buffers(fence):
    body = BUFFERING.replace("@%p1 ld.relaxed", f"{fence};\n@%p1 ld.relaxed")
    seen = set()
    for seed in range(50):
        out = words(2)
        launch(body, words(2), out, programs=2, schedule=Schedule(seed, True))
        seen.add(tuple(out.tolist()))
    assert ((0, 0) in seen) == (fence in ("fence.acq_rel.gpu", "fence.sc.cta"))


# Program 0 stores a row of four words at once; program 1 loads it twice, with threads 0 and, after a barrier, 32
ROWS = """
setp.eq.b32 %p1, %r2, 0;
setp.eq.b32 %p2, %r1, 0;
and.pred %p3, %p1, %p2;
not.pred %p4, %p1;
and.pred %p5, %p4, %p2;
setp.eq.b32 %p6, %r1, SECOND;
and.pred %p7, %p4, %p6;
mov.b32 %r3, 1;
@%p3 STORE [%rd1], {%r3, %r3, %r3, %r3};
@%p5 LOAD {%r5, %r6, %r7, %r8}, [%rd1];
@%p5 st.global.v4.b32 [%rd2], {%r5, %r6, %r7, %r8};
bar.sync 0;
@%p7 LOAD {%r5, %r6, %r7, %r8}, [%rd1];
@%p7 st.global.v4.b32 [%rd2+16], {%r5, %r6, %r7, %r8};
"""


def rows(seed, second, load="ld.volatile.global.v4.b32", store="st.global.v4.b32"):
    out = words(8)
    body = ROWS.replace("SECOND", str(second)).replace("LOAD", load).replace("STORE", store)
    launch(body, words(4), out, threads=64, programs=2, schedule=Schedule(seed, True), allowed=RACES)
    return out[:4].tolist(), out[4:].tolist()


def test_elements_of_one_store_are_seen_one_by_one():
    assert any(len(set(first)) == 2 for first, _ in (rows(seed, 0) for seed in SEEDS))


def test_a_thread_never_sees_an_element_become_old_again():
    for seed in range(150):
        first, second = rows(seed, 0)
        assert all(a <= b for a, b in zip(first, second, strict=True))


def test_another_thread_may_still_see_the_old_element_after_a_barrier():
    """PTX orders what the first thread did, not what it happened to see of a weak store."""
    assert any(a > b for seed in range(150) for a, b in zip(*rows(seed, 32), strict=True))


# Program 0 releases to a counter, program 1 adds to it, program 2 waits for both and reads what program 0 stored
CHAIN = """
setp.eq.b32 %p9, %r1, 0;
setp.eq.b32 %p1, %r2, 0;
and.pred %p1, %p1, %p9;
setp.eq.b32 %p2, %r2, 1;
and.pred %p2, %p2, %p9;
setp.eq.b32 %p3, %r2, 2;
and.pred %p3, %p3, %p9;
mov.b32 %r3, 1;
@%p1 st.global.b32 [%rd1], %r3;
@%p1 atom.global.gpu.release.add.u32 %r4, [%rd2], 1;
@!%p2 bra $third;
$second:
ld.relaxed.gpu.global.b32 %r4, [%rd2];
setp.eq.b32 %p4, %r4, 0;
@%p4 bra $second;
atom.global.gpu.relaxed.add.u32 %r4, [%rd2], 1;
$third:
@!%p3 bra $end;
$wait:
atom.global.gpu.acquire.add.u32 %r4, [%rd2], 0;
setp.lt.u32 %p4, %r4, 2;
@%p4 bra $wait;
ld.global.b32 %r5, [%rd1];
st.global.b32 [%rd3], %r5;
$end:
"""


def test_an_atomic_hands_on_what_was_released_before():
    for seed in range(150):
        out = words(1)
        launch(CHAIN, words(1), words(1), out, programs=3, schedule=Schedule(seed, True))
        assert out[0] == 1


def test_without_an_acquire_the_chain_is_a_race():
    with pytest.raises(Fault, match="a race on a"):
        launch(
            CHAIN.replace("acquire", "relaxed"), words(1), words(1), words(1), programs=3, schedule=Schedule(0, True)
        )


def test_what_one_thread_acquires_the_others_know_after_a_barrier():
    body = PASSING.replace("setp.eq.b32 %p2, %r1, 0;", "setp.eq.b32 %p2, %r1, 0;\nsetp.eq.b32 %p8, %r1, 33;")
    body = body.replace("@%p5 LD_DATA", "and.pred %p7, %p4, %p8;\n@%p7 LD_DATA").replace(
        "@%p5 st.global.b32 [%rd3+4]", "@%p7 st.global.b32 [%rd3+4]"
    )
    loop = "$again:\n@%p5 ld.acquire.gpu.global.b32 %r5, [%rd2];\nsetp.eq.b32 %p6, %r5, 0;\n"
    loop += "and.pred %p6, %p6, %p5;\n@%p6 bra $again;"
    body = (
        body.replace("@%p5 LD_FLAG %r5, [%rd2];", loop)
        .replace("ST_DATA", "st.global.b32")
        .replace("LD_DATA", "ld.global.b32")
    )
    body = body.replace("ST_FLAG", RELEASE).replace("AFTER", "")
    for seed in range(30):
        out = words(2)
        launch(
            body.replace("BEFORE", "bar.sync 0;"),
            words(1),
            words(1),
            out,
            programs=2,
            threads=64,
            schedule=Schedule(seed, True),
        )
        assert out.tolist() == [1, 1]
    with pytest.raises(Fault, match="a race on a"):
        launch(
            body.replace("BEFORE", ""), words(1), words(1), words(2), programs=2, threads=64, schedule=Schedule(0, True)
        )


WAITING = """
setp.eq.b32 %p1, %r2, WHO;
@%p1 st.relaxed.gpu.global.b32 [%rd1], %r2;
$again:
ld.relaxed.gpu.global.b32 %r5, [%rd1];
setp.ne.b32 %p2, %r5, WHO;
@%p2 bra $again;
"""
ONE_THREAD = ("@%p1 st", "setp.eq.b32 %p3, %r1, 0;\nand.pred %p1, %p1, %p3;\n@%p1 st")


@pytest.mark.parametrize("weak", [False, True])
def test_a_poll_sees_a_store_in_the_end(weak):
    for seed in range(20):
        launch(WAITING.replace("WHO", "1").replace(*ONE_THREAD), words(1), programs=3, schedule=Schedule(seed, weak))


def test_programs_that_wait_for_nothing():
    with pytest.raises(Fault, match=r"programs wait for each other forever .*program 0 at"):
        launch(WAITING.replace("WHO", "7").replace(*ONE_THREAD), words(1), programs=3)


def test_programs_of_a_plain_launch_cannot_wait_for_each_other():
    with pytest.raises(Fault, match="forever"):
        launch(WAITING.replace("WHO", "1").replace(*ONE_THREAD), words(1), programs=2, cooperative=False)


def test_a_cached_load_may_never_see_a_store():
    body = WAITING.replace("ld.relaxed.gpu.global.b32", "ld.global.b32").replace("WHO", "1").replace(*ONE_THREAD)
    with pytest.raises(Fault, match=r"forever|a race on a"):
        launch(body, words(1), programs=2, schedule=Schedule(1, True))


def test_a_seed_gives_the_same_run():
    assert [rows(seed, 32) for seed in SEEDS] == [rows(seed, 32) for seed in SEEDS]


def test_a_failing_schedule_is_shrunk_and_replayed():
    def fails(schedule):
        out = words(2)
        body = PASSING
        for name, opcode in (PLAIN | {"LD_DATA": "ld.global.cg.b32"}).items():
            body = body.replace(name, opcode)
        launch(body, words(1), words(1), out, programs=2, schedule=schedule, allowed=RACES)
        return out.tolist() == [1, 0]

    found = next(s for s in (Schedule(seed, True) for seed in range(500)) if fails(s) and len(s.made) > 1)
    short = shrink(found, fails)
    assert short.only is not None and len(short.only) < len(found.made)
    assert Decision("late", 0, 0) in short.only  # the data is seen late
    assert fails(dataclasses.replace(short, made=set()))
    assert f"seed {found.seed}, weak memory: " in str(short) and "late 0@0" in str(short)
    assert fails(Schedule.parse(str(short)))


@pytest.mark.parametrize("only", [None, frozenset(), frozenset({Decision("late", 0, 3), Decision("switch", 1, 9)})])
def test_a_schedule_is_read_from_its_text(only):
    schedule = Schedule(7, True, only)
    assert Schedule.parse(str(schedule)) == schedule
    with pytest.raises(ValueError, match="reads like"):
        Schedule.parse("seven")
