"""The way of a step through its control-flow graph: small listings in the forms that compiled time loops have."""

import pytest
from listing import code

from triton_lstm.perf.step.graph import Graph
from triton_lstm.perf.step.path import NoStepError, find_path, step_instructions

HEAD = ["tile:", "LDG.E R1, [R0]", "step:", "LDG.E.U16 R2, [R1]"]
POLL = "LDG.E.STRONG.GPU R3, [R1]"
ROWS, MMA = "LDG.E.128.STRONG.SYS R4, [R1]", "HMMA.16816.F32 R8, R4, R2, R8"
TAIL = ["STG.E.U16 [R1], R2", "@P1 BRA step", "STG.E [R0], R1", "@P2 BRA tile", "EXIT"]

AGAIN = ["@P5 BRA there", "again:", "LDG.E.U16.STRONG.SYS R4, [R1]", "@P5 BRA again", "there:"]
WAITING = [*HEAD, "wait:", POLL, "@P3 BRA wait", ROWS, MMA, *TAIL]
# What was missing is loaded again, which a step in time does not come to
CHECKED = [*HEAD, "wait:", POLL, "@P3 BRA wait", ROWS, *AGAIN, MMA, "BAR.SYNC 0x0", *TAIL]
BARRIER = [*HEAD, "wait:", "BAR.SYNC 0x0", "@P2 BRA others", POLL, "others:", "BAR.SYNC 0x0"]
BARRIER += ["@P1 BRA wait", "LDG.E.128.STRONG.GPU R4, [R1]", MMA, "STG.E.U16 [R1], R2", "@P2 BRA end"]
BARRIER += ["REDG.E.ADD.STRONG.GPU [R1], R13", "end:", *TAIL]
PARTS = [*HEAD, "wait:", POLL, "@P3 BRA wait", ROWS, *AGAIN, MMA, "STG.E [R1], R8", "BAR.SYNC 0x0"]
PARTS += ["done:", POLL, "@P3 BRA done", "parts:", ROWS, "@P3 BRA parts", *TAIL]
STREAMED = [*HEAD, "wait:", POLL, "@P3 BRA wait", "chunk:", ROWS, *AGAIN, "LDG.E.128 R6, [R1]", MMA]
STREAMED += ["@P3 BRA chunk", "BAR.SYNC 0x0", *TAIL]
HEADED = [*HEAD, "wait:", "@P3 BRA go", POLL, "BRA wait", "go:", ROWS, MMA, *TAIL]
ALONE = [*HEAD, MMA, *TAIL]


def short(path, piece):
    """A piece in words, one letter an instruction that matters."""
    letters = {"load": "p", "store": "s", "barrier": "b", "mma": "m", "atomic": "a"}
    found = (path.code[k] for k in piece.instructions)
    text = "".join(letters.get(i.kind, "") if not (i.strong and i.width == 16) else "r" for i in found)
    return f"{piece.kind} {text}".strip()


def pieces(lines, chunks=1):
    path = find_path(code(*lines), chunks)
    return [short(path, piece) for piece in path.pieces]


@pytest.mark.parametrize(
    "lines, expected",
    [
        (WAITING, ["run p", "look p", "product rms"]),
        (CHECKED, ["run p", "look p", "product rmbs"]),
        (BARRIER, ["run p", "look bpb", "product pms", "run as"]),
        (PARTS, ["run p", "look p", "product rmsb", "look p", "look r", "run s"]),
        (STREAMED, ["run p", "look p", "product rpmrpmrpm", "run bs"]),
        (HEADED, ["run p", "look p", "product rms"]),
        (ALONE, ["product pms"]),
    ],
    ids=["waiting", "checked", "barrier", "parts", "streamed", "headed", "alone"],
)
def test_a_step_in_time(lines, expected):
    """LDG.STRONG.GPU of 16 bytes is a row's as well: the barrier's kernels load them past the first cache."""
    found = pieces(lines, chunks=3)
    assert [piece.replace("r", "p") for piece in found] == [piece.replace("r", "p") for piece in expected]


def test_the_step_is_not_the_loop_over_tiles_nor_a_wait():
    texts = [i.text for i in step_instructions(code(*CHECKED))]
    assert texts.count("STG.E.U16 [R1], R2") == 1 and "STG.E [R0], R1" not in texts and "LDG.E.U16 R2, [R1]" in texts


@pytest.mark.parametrize("lines", [[], ["EXIT"], ["loop:", MMA, "@P0 BRA loop", "STG.E [R0], R1", "EXIT"]])
def test_code_without_a_step(lines):
    with pytest.raises(NoStepError, match="no loop with a store"):
        find_path(code(*lines))


def test_loops_are_natural_ones():
    graph = Graph(code(*STREAMED))
    headers = {loop.header: len(loop.blocks) for loop in graph.loops}
    assert len(headers) == 5 and max(headers.values()) == headers[0]  # tiles, steps, wait, chunks, what is missing
    assert [len(loop.blocks) for loop in graph.loops] == sorted(headers.values(), reverse=True)
