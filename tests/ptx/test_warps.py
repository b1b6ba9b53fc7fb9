"""Instructions of whole warps: shuffles by the manual's own program, reductions, votes; and who a thread is."""

from __future__ import annotations

import numpy as np
import pytest

from .lines import run_lines

LANES = np.arange(32, dtype=np.uint32)


def test_who_a_thread_is():
    code = "mov.u32 %a, %tid.x; mov.u32 %b, %laneid; mov.u32 %c, %warpid; mov.u32 %d, %ctaid.x; mov.u32 %e, %nctaid.z;"
    found = run_lines(code, dict.fromkeys(("%a", "%b", "%c", "%d", "%e"), 4), {}, 64)
    assert found["%a"].tolist() == [*range(64)] and found["%b"].tolist() == [*range(32)] * 2
    assert found["%c"].tolist() == [0] * 32 + [1] * 32
    assert found["%d"].tolist() == [0] * 64 and found["%e"].tolist() == [1] * 64


# mode, step or lane, clamp with the segments' mask at bit 8, and the lane whose value each lane gets
SHUFFLES = [
    ("bfly", 1, "31", [lane ^ 1 for lane in range(32)]),
    ("bfly", 16, "0x1f", [lane ^ 16 for lane in range(32)]),
    ("bfly", 8, "7", [lane if lane ^ 8 > 7 else lane ^ 8 for lane in range(32)]),  # beyond the clamp: its own
    ("bfly", 33, "31", [lane ^ 1 for lane in range(32)]),  # five bits count
    ("down", 2, "31", [*range(2, 32), 30, 31]),
    ("down", 3, "0x181f", [8 * (lane // 8) + lane % 8 + (3 if lane % 8 < 5 else 0) for lane in range(32)]),
    ("up", 2, "0", [0, 1, *range(30)]),
    ("up", 2, "0x1800", [8 * (lane // 8) + lane % 8 - (2 if lane % 8 > 1 else 0) for lane in range(32)]),
    ("idx", 5, "31", [5] * 32),
    ("idx", 37, "31", [5] * 32),
    ("idx", 3, "0x181f", [8 * (lane // 8) + 3 for lane in range(32)]),
    ("idx", 9, "0x181f", [8 * (lane // 8) + 1 for lane in range(32)]),
    ("idx", 9, "7", [*range(32)]),  # lane 9 is beyond the clamp
]  # fmt: skip


@pytest.mark.parametrize("threads", [32, 96])
@pytest.mark.parametrize("mode, by, clamp, lanes", SHUFFLES)
def test_shuffles(mode, by, clamp, lanes, threads):
    values = 1000 + np.arange(threads, dtype=np.uint32)
    expected = [1000 + 32 * warp + lane for warp in range(threads // 32) for lane in lanes]
    for step in (str(by), "%b"):
        code = f"shfl.sync.{mode}.b32 %d, %a, {step}, {clamp}, -1;"
        found = run_lines(code, {"%d": 4}, {"%a": values, "%b": np.full(1, by, np.uint32)}, threads)["%d"]
        assert found.tolist() == expected


def test_a_shuffle_tells_whether_its_lane_was_in_range():
    code = "shfl.sync.down.b32 %d|%p0, %a, %a, 31, 0xffffffff;"  # each lane with its own step
    found = run_lines(code, {"%d": 4, "%p0": 0}, {"%a": LANES})
    assert found["%p0"].tolist() == [1] * 16 + [0] * 16
    assert found["%d"].tolist() == [*range(0, 32, 2), *range(16, 32)]


@pytest.mark.parametrize(
    "what, results",
    [
        ("add.s32", [400, 1424]),  # 16 pairs of -3 + 28, and of 29 + 60
        ("min.s32", [-3, 29]),
        ("min.u32", [0, 29]),
        ("max.s32", [28, 60]),
        ("max.u32", [-1, 60]),
        ("and.b32", [0, 0]),
        ("or.b32", [-1, 63]),
        ("xor.b32", [-32, 32]),
    ],
)
def test_reductions_of_a_warp(what, results):
    values = (np.arange(64) - 3).astype(np.uint32)
    code = f"mov.b32 %r0, -1; redux.sync.{what} %d, %a, %r0;"
    found = run_lines(code, {"%d": 4}, {"%a": values}, 64)["%d"]
    assert found.tolist() == [result % 2**32 for result in results for _ in range(32)]


@pytest.mark.parametrize(
    "what, size, results",
    [("any.pred", 0, [1, 0]), ("all.pred", 0, [0, 0]), ("ballot.b32", 4, [0b111, 0])],
)
def test_votes(what, size, results):
    code = f"setp.lt.u32 %p0, %a, 3; vote.sync.{what} %d, %p0, -1;"
    values = np.arange(64, dtype=np.uint32)
    assert run_lines(code, {"%d": size}, {"%a": values}, 64)["%d"].tolist() == np.repeat(results, 32).tolist()
    code = code.replace("%d, %p0", "%d, !%p0")
    results = {"any.pred": [1, 1], "all.pred": [0, 1], "ballot.b32": [2**32 - 8, 2**32 - 1]}[what]
    assert run_lines(code, {"%d": size}, {"%a": values}, 64)["%d"].tolist() == np.repeat(results, 32).tolist()


@pytest.mark.parametrize(
    "code",
    [
        "bar.sync 0;",  # the first of all, behind what the kernel begins with
        "bar.sync 0; bar.sync 0; barrier.cta.sync.aligned 0; bar.warp.sync -1;",
        "setp.lt.u32 %p0, %r98, 5; @%p0 bra L;\nmov.b32 %r0, 1;\nL: bar.sync 0;",
        "setp.lt.u32 %p0, %r98, 32; @%p0 bra L;\nmov.b32 %r0, 1; mov.b32 %r0, 2;\nL: bar.sync 0; bar.sync 0;",
        "setp.lt.u32 %p0, %r98, 5; @%p0 bra L;\nbra.uni M;\nL: mov.b32 %r0, 1;\nM: bar.sync 0;",
    ],
)
def test_barriers_where_threads_meet(code):
    before = "mad.lo.s32 %r1, %r98, 4, global_smem; st.shared.b32 [%r1], %r98;"
    after = "xor.b32 %r2, %r98, 33; mad.lo.s32 %r1, %r2, 4, global_smem; ld.shared.b32 %d, [%r1];"
    found = run_lines(before + code + after, {"%d": 4}, {}, 64, 256)["%d"]
    assert found.tolist() == [thread ^ 33 for thread in range(64)]
