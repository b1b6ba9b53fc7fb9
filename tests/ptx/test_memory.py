"""What the emulator reports about memory: places, unwritten values, races, barriers that not everyone reaches."""

import numpy as np
import pytest

from . import machine
from .faults import Fault
from .gpu import poison
from .snippets import launch

UNWRITTEN = poison(np.dtype(np.uint32))
WORDS = "mul.wide.u32 %rd9, %r1, 4;\n"  # the thread's word: an offset


def words(n=64, value=7):
    return np.full(n, value, np.uint32)


def unwritten(n=64):
    return np.full(n, UNWRITTEN, np.uint32)


def test_an_access_beyond_a_tensor_says_which_and_where():
    with pytest.raises(Fault, match=r"thread 31 accesses 4 bytes at byte 124 of a, which has 124: .*ld.global.b32"):
        launch(WORDS + "add.s64 %rd8, %rd1, %rd9;\nld.global.b32 %r3, [%rd8];", words(31))


def test_an_access_between_tensors():
    with pytest.raises(Fault, match="byte 256 of a"):
        launch("add.s64 %rd8, %rd1, 256;\nld.global.b32 %r3, [%rd8];", words(64), words(64))


def test_an_access_before_all_tensors():
    with pytest.raises(Fault, match="no tensor"):
        launch("add.s64 %rd8, %rd1, -4;\nld.global.b32 %r3, [%rd8];", words())


@pytest.mark.parametrize("offset, opcode", [(4, "v2.b32 {%r3, %r4}"), (8, "v4.b32 {%r3, %r4, %r5, %r6}")])
def test_a_misaligned_access(offset, opcode):
    with pytest.raises(Fault, match="misaligned"):
        launch(f"ld.global.{opcode}, [%rd1+{offset}];", words())


@pytest.mark.parametrize("access", ["ld.volatile.global.v2.b32 {%r3, %r4}, [%rd1];", "st.global.b32 [%rd1+4], %r1;"])
def test_an_element_is_accessed_as_a_whole(access):
    """To PTX a vector is as many accesses as it has elements, in any order."""
    pairs = np.full(32, 7, np.uint64)
    launch("ld.volatile.global.b64 %rd3, [%rd1];\nld.global.v2.b64 {%rd3, %rd4}, [%rd1];", pairs)
    with pytest.raises(Fault, match="4 bytes splits elements of a"):
        launch(access, pairs)


def test_what_nobody_wrote():
    a = words()
    a[5] = UNWRITTEN
    with pytest.raises(Fault, match="thread 5 reads what nobody wrote, element 5 of a"):
        launch(WORDS + "add.s64 %rd8, %rd1, %rd9;\nld.global.b32 %r3, [%rd8];", a)


def test_a_thread_may_read_what_it_wrote():
    a = unwritten()
    launch(WORDS + "add.s64 %rd8, %rd1, %rd9;\nst.global.b32 [%rd8], %r1;\nld.global.b32 %r3, [%rd8];", a)
    assert a[:32].tolist() == list(range(32))


def test_an_input_is_not_stored_to():
    with pytest.raises(Fault, match="a is an input, and stored to"):
        launch("setp.eq.b32 %p1, %r1, 0;\n@%p1 st.global.b32 [%rd1], %r1;", words(), inputs=(0,))


def test_threads_that_store_one_element():
    with pytest.raises(Fault, match="several threads store one element of a"):
        launch("st.global.b32 [%rd1], %r1;", words())


NEIGHBOUR = """
mul.wide.u32 %rd9, %r1, 4;
add.s64 %rd8, %rd1, %rd9;
st.global.b32 [%rd8], %r1;
BARRIER
xor.b32 %r3, %r1, DISTANCE;
mul.wide.u32 %rd7, %r3, 4;
add.s64 %rd6, %rd1, %rd7;
ld.global.b32 %r4, [%rd6];
"""


@pytest.mark.parametrize(
    "barrier, distance, races",
    [
        ("", 1, True),
        ("", 32, True),
        ("bar.warp.sync -1;", 1, False),
        ("bar.warp.sync -1;", 32, True),
        ("bar.sync 0;", 1, False),
        ("bar.sync 0;", 32, False),
        ("membar.cta;", 1, True),  # a fence waits for nobody
    ],
)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_a_neighbours_value(barrier, distance, races, space):
    body = NEIGHBOUR.replace("BARRIER", barrier).replace("DISTANCE", str(distance))
    if space == "shared":
        body = (
            body.replace("global", "shared")
            .replace("mul.wide.u32 %rd9", "mul.lo.s32 %r9")
            .replace("%rd7, %r3", "%r7, %r3")
        )
        body = body.replace("mul.wide.u32 %r7", "mul.lo.s32 %r7").replace("%rd8, %rd1, %rd9", "%r8, %r20, %r9")
        body = body.replace("%rd6, %rd1, %rd7", "%r6, %r20, %r7").replace("add.s64", "add.s32").replace("[%rd", "[%r")
        body = "mov.b32 %r20, global_smem;\n" + body
    run = lambda: launch(body, unwritten(), threads=64, shared=256)  # noqa: E731 - called twice below
    if not races:
        run()
        return
    with pytest.raises(Fault, match="a race"):
        run()


OVERWRITE = NEIGHBOUR + "BARRIER2\nst.global.b32 [%rd8], %r4;\n"


@pytest.mark.parametrize("second, races", [("", True), ("bar.sync 0;", False)])
def test_a_store_after_a_neighbours_load(second, races):
    body = OVERWRITE.replace("BARRIER2", second).replace("BARRIER", "bar.sync 0;").replace("DISTANCE", "33")
    if not races:
        launch(body, unwritten(), threads=64)
        return
    with pytest.raises(Fault, match=r"a race on a.*st\.global\.b32.*ld\.global\.b32"):
        launch(body, unwritten(), threads=64)


def test_programs_that_store_what_another_reads():
    other = "xor.b32 %r3, %r2, 1;\nmul.wide.u32 %rd9, %r3, 4;\nadd.s64 %rd8, %rd1, %rd9;\nmul.wide.u32 %rd7, %r2, 4;\n"
    other += "add.s64 %rd6, %rd1, %rd7;\nsetp.eq.b32 %p1, %r1, 0;\n"
    with pytest.raises(Fault, match="a race on a"):
        launch(other + "@%p1 ld.global.b32 %r4, [%rd8];\n@%p1 st.global.b32 [%rd6], %r2;", words(), programs=2)


@pytest.mark.parametrize(
    "body, says",
    [
        (
            "mov.b32 %r3, global_smem;\nld.shared.b32 %r4, [%r3+64];",
            "accesses 4 bytes at byte 64 of shared memory, which has 64",
        ),
        ("mov.b32 %r3, global_smem;\nld.shared.b32 %r4, [%r3+-4];", "at byte -4 of shared memory"),
        ("mov.b32 %r3, global_smem;\nld.shared.b64 %rd4, [%r3+4];", "a misaligned access of 8 bytes"),
        ("mov.b32 %r3, global_smem;\nld.shared.b32 %r4, [%r3];", "a load of shared memory that nobody wrote"),
        ("mov.b32 %r3, global_smem;\nst.shared.b32 [%r3], %r1;", "store different values to one place"),
    ],
)
def test_shared_memory(body, says):
    with pytest.raises(Fault, match=says):
        launch(body, words(), shared=64)


def test_unknown_sizes_of_shared_memory_are_kept_apart():
    """Stores of 2 bytes by neighbours are no race, although they share a word."""
    body = "mov.b32 %r3, global_smem;\nshl.b32 %r4, %r1, 1;\nadd.s32 %r5, %r3, %r4;\ncvt.u16.u32 %rs1, %r1;\n"
    launch(body + "st.shared.b16 [%r5], %rs1;\nld.shared.b16 %rs2, [%r5];", words(), shared=64)


ONE_BY_ONE = """
shr.u32 %r3, %r1, 5;
mov.b32 %r4, 0;
$again:
add.s32 %r4, %r4, 1;
mul.wide.u32 %rd9, %r1, 4;
add.s64 %rd8, %rd1, %rd9;
ld.global.b32 %r5, [%rd8];
setp.lt.u32 %p1, %r4, %r3;
@%p1 bra $again;
bar.sync 0;
st.global.b32 [%rd8], %r4;
"""


def test_warps_leave_a_loop_one_by_one():
    a = words(128)
    launch(ONE_BY_ONE, a, threads=128)
    assert a.tolist() == [max(1, k // 32) for k in range(128)]


def test_threads_of_a_warp_leave_a_loop_one_by_one():
    a = words(128)
    launch(ONE_BY_ONE.replace("shr.u32 %r3, %r1, 5", "and.b32 %r3, %r1, 7"), a, threads=128)
    assert a.tolist() == [max(1, k % 8) for k in range(128)]


SOME = "setp.lt.u32 %p1, %r1, LIMIT;\n@%p1 bra $there;\n{}$there:\n{}"


@pytest.mark.parametrize("limit", [32, 5])
def test_a_barrier_that_not_everyone_reaches(limit):
    with pytest.raises(Fault, match=rf"not all threads reach a barrier.*threads {limit}-63 at"):
        launch(SOME.format("bar.sync 0;\n", "").replace("LIMIT", str(limit)), words(), threads=64)


def test_two_barriers_are_not_one():
    body = SOME.format("bar.sync 0;\nbra $end;\n", "bar.sync 0;\n$end:\n").replace("LIMIT", "32")
    with pytest.raises(Fault, match=r"threads 32-63 at .*threads 0-31 at|threads 0-31 at .*threads 32-63 at"):
        launch(body, words(), threads=64)


def test_a_shuffle_needs_the_whole_warp():
    with pytest.raises(Fault, match=r"threads 5-31 at .*shfl"):
        launch(SOME.format("shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;\n", "").replace("LIMIT", "5"), words())


SPLITS = "@%p1 bra $even;\nadd.s32 %r4, %r4, 1;\n$even:\nadd.s32 %r3, %r3, 1;\n"


@pytest.mark.parametrize("body", ["add.s32 %r3, %r3, 1;\n", "bar.sync 0;\n", SPLITS], ids=["adds", "barrier", "splits"])
def test_a_loop_without_an_end(body, monkeypatch):
    monkeypatch.setattr(machine, "ENDLESS", 1000)
    parity = "and.b32 %r3, %r1, 1;\nsetp.eq.b32 %p1, %r3, 0;\n"
    with pytest.raises(Fault, match="a loop that never ends"):
        launch(f"{parity}$again:\n{body}bra.uni $again;", words(), threads=64)


def test_a_loop_that_looks_at_one_word_and_counts_ends():
    """Nobody stores, but it waits for nobody."""
    body = "mov.b32 %r3, 0;\n$again:\nadd.s32 %r3, %r3, 1;\nld.global.b32 %r4, [%rd1];\nsetp.lt.u32 %p1, %r3, 20;\n"
    end = "@%p1 bra $again;\nbar.sync 0;\nsetp.eq.b32 %p2, %r1, 0;\n@%p2 st.global.b32 [%rd1], %r3;"
    a = words()
    launch(body + end, a)
    assert a[0] == 20


@pytest.mark.parametrize("barrier, races", [("bar.warp.sync -1;", False), ("", True)])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_a_store_after_two_lanes_loads(space, barrier, races):
    """The second lane's own load comes after the first one's, whose warp was synchronized."""
    where = "[%rd1]" if space == "global" else "[global_smem]"
    body = f"setp.eq.b32 %p1, %r1, 0;\nsetp.eq.b32 %p2, %r1, 1;\n@%p1 st.{space}.b32 {where}, %r1;\nbar.warp.sync -1;\n"
    body += f"@%p1 ld.{space}.b32 %r5, {where};\n{barrier}\n@%p2 ld.{space}.b32 %r6, {where};\n"
    body += f"@%p2 st.{space}.b32 {where}, %r6;"
    if not races:
        launch(body, words(), shared=64)
        return
    with pytest.raises(Fault, match="a race"):
        launch(body, words(), shared=64)


# Two products of the same operands in shared memory, each a group of its own; then that memory is stored to
PRODUCT = """
mad.lo.s32 %r20, %r1, 4, global_smem;
REPEATED st.shared.b32 [%r20+OFFSET], 0;
fence.proxy.async.shared::cta;
bar.sync 0;
wgmma.fence.sync.aligned;
setp.eq.b32 %p1, %r1, %r1;
mov.b64 %rd9, 0x4000004000000040;
MULTIPLY
wgmma.commit_group.sync.aligned;
MULTIPLY
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned LEFT;
bar.sync 0;
st.shared.b32 [%r20], 1;
wgmma.wait_group.sync.aligned 0;
"""
MULTIPLY = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r30, %r31, %r32, %r33}, %rd9, %rd9, %p1, 1, 1, 0, 0;"


@pytest.mark.parametrize("left", [0, 1])
def test_a_store_to_what_the_second_of_two_products_reads(left):
    body = PRODUCT.replace("MULTIPLY", MULTIPLY).replace("LEFT", str(left))
    lines = body.splitlines()
    at = next(k for k, line in enumerate(lines) if "REPEATED" in line)
    lines[at : at + 1] = [lines[at].replace("REPEATED ", "").replace("OFFSET", str(512 * k)) for k in range(16)]
    run = lambda: launch("\n".join(lines), words(), threads=128, shared=8192)  # noqa: E731 - called twice below
    if left == 0:
        run()
        return
    with pytest.raises(Fault, match="a store to shared memory that a product may still read"):
        run()
