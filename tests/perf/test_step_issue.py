"""When warps issue, against sequences worked out by hand."""

import dataclasses

import pytest
from listing import code

from triton_lstm.perf.step.constants import H100
from triton_lstm.perf.step.issue import Operation, issue, mean_by_reason

ADD = "FADD R1, R1, R2"
ROUND = dataclasses.replace(
    H100, l2=200, memory=600, port=64, shared_load=30, barrier=20, operands_read=10, issue_mma=8, fence=400, special=20
)


def times(*lines, warps=1, programs=1, **of_loads):
    """By warp, when each instruction issues."""
    trace = [Operation(i, **(of_loads if i.kind == "load" else {})) for i in code(*lines)]
    return issue(trace, warps, ROUND, programs).times


def test_stall_counts():
    assert times(f"{ADD} | s4", f"{ADD} | s2", ADD, f"{ADD} | s0", ADD) == [[0, 4, 6, 7, 8]]


def test_a_scoreboard_is_waited_for():
    assert times("LDG.E R2, [R4] | w0", ADD, f"{ADD} | ?0") == [[0, 1, 200]]
    assert times("LDG.E R2, [R4] | w0", f"{ADD} | ?0", from_memory=True) == [[0, 600]]
    assert times("LDG.E R2, [R4] | w0", f"{ADD} | ?1") == [[0, 1]]
    assert times("STG.E [R4], R2 | r3", f"{ADD} | ?3") == [[0, 11]]  # one pass, then its operands have been read
    assert times("LDG.E R2, [R4] | w0", "LDS R3, [R5] | w0", f"{ADD} | ?0") == [[0, 2, 200]]  # the later one of both
    assert times("MUFU.EX2 R2, R2 | w1", f"{ADD} | ?1") == [[0, 20]]


def test_warps_of_a_scheduler_share_it():
    """Five warps on four schedulers: the fifth comes when the first has nothing to issue."""
    assert times(ADD, ADD, ADD, warps=5) == [[0, 1, 2]] * 4 + [[3, 4, 5]]
    assert times(f"{ADD} | s3", ADD, warps=5) == [[0, 3]] * 4 + [[1, 4]]


def test_pipes():
    assert times("HMMA.16816.F32 R4, R8, R2, R4", "HMMA.16816.F32 R4, R8, R2, R4", ADD) == [[0, 8, 9]]
    assert times("LOP3.LUT R1, R2, R3", "LOP3.LUT R1, R2, R3", "IMAD R1, R2, R3, R4") == [[0, 2, 3]]
    assert times("MUFU.EX2 R2, R2", "F2F.BF16.F32 R3, R3", "MUFU.EX2 R2, R2") == [[0, 8, 16]]


def test_the_load_and_store_unit_takes_128_bytes_a_cycle():
    """Four warps load 16 bytes a thread each from shared memory: 4 passes each, one after another."""
    loaded = times("LDS.128 R4, [R2] | w0", f"{ADD} | ?0", warps=4)
    assert loaded == [[0, 4 + 30], [0, 8 + 30], [0, 12 + 30], [0, 16 + 30]]


def test_the_port_to_l2():
    """512 bytes of a warp take 8 cycles of the port, the second warp's come behind those of the first."""
    loaded = times("LDG.E.128 R4, [R2] | w0", f"{ADD} | ?0", warps=2, moved=512)
    assert loaded == [[0, 200], [0, 208]]
    narrow = dataclasses.replace(ROUND, port=32)
    trace = [Operation(i, moved=512) for i in code("LDG.E.128 R4, [R2] | w0", f"{ADD} | ?0")]
    assert issue(trace, 2, narrow).times == [[0, 200], [0, 216]]


def test_a_barrier_waits_for_the_last_warp_and_its_stores():
    """Warp 4 issues behind warp 0; all leave 20 cycles after it came, and later if shared memory is not done."""
    assert times("BAR.SYNC 0x0", ADD, warps=5) == [[0, 21]] * 4 + [[1, 22]]
    stored = times("STS.128 [R2], R4", "BAR.SYNC 0x0", ADD, warps=4)
    assert stored == [[0, 1, 16 + 20]] * 4
    assert times("BAR.ARV 0x0", ADD, warps=2) == [[0, 1], [0, 1]]


def test_programs_share_a_processor_but_no_barrier():
    """The second program's warp is on the first one's scheduler; it need not come to the barrier."""
    assert times("BAR.SYNC 0x0", ADD, programs=2) == [[0, 20], [1, 21]]


def test_a_fence_holds_a_warp():
    assert times("MEMBAR.ALL.GPU", ADD) == [[0, 400]]


def test_lines_of_instructions():
    """Of two lines, the cache holds one: each costs 40 cycles, every time, but it is there for a second warp."""
    slow = dataclasses.replace(ROUND, fetch=40, lines=1)
    trace = [Operation(i, line=line) for line, i in zip((0, 0, 1, 1, 0), code(*[ADD] * 5), strict=True)]
    assert issue(trace, 1, slow).times == [[0, 40, 80, 81, 121]]  # the first line is looked for behind its first use
    assert issue(trace, 1, dataclasses.replace(slow, lines=2)).times == [[0, 40, 80, 81, 82]]
    assert issue(trace, 1, dataclasses.replace(slow, fetch=0)).times == [[0, 1, 2, 3, 4]]


def test_wgmma():
    """64x32x16: 16 cycles for its rows and 8 for its columns, the next one behind it, and 20 until all are done."""
    product = "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR56], R24"
    assert times(product, product, "WARPGROUP.DEPBAR.LE gsb0, 0x0") == [[0, 1, 48 + 20]]


def test_reasons_add_up_to_the_time():
    trace = [Operation(i) for i in code("LDG.E R2, [R4] | w0", f"{ADD} | ?0 s4", ADD, "BAR.SYNC 0x0", ADD)]
    issued = issue(trace, 4, ROUND)
    reasons = mean_by_reason(issued, 0, len(trace))
    assert reasons["memory"] == pytest.approx(issued.times[0][1], abs=8) and reasons["barrier"] >= 20
    assert sum(reasons.values()) == pytest.approx(sum(t[-1] for t in issued.times) / 4)
