"""The way of a step through its control-flow graph: small listings in the forms that compiled time loops have."""

import pytest
from listing import code

from triton_lstm.perf.step.graph import Graph
from triton_lstm.perf.step.path import NoStepError, find_path, step_instructions

HEAD = ["tile:", "LDG.E R1, [R0]", "step:", "LDG.E.U16 R2, [R1]"]
POLL = "LDG.E.U16.STRONG.SYS R3, [R1]"
ROWS, MMA = "LDG.E.128.STRONG.SYS R4, [R1]", "HMMA.16816.F32 R8, R4, R2, R8"
TAIL = ["STG.E.U16 [R1], R2", "@P1 BRA step", "STG.E [R0], R1", "@P2 BRA tile", "EXIT"]

# What several failures lead to, and what each of them does
NOW = [*HEAD, "retry:", ROWS, MMA, "@P3 BRA tail", "BAR.SYNC 0x0", "@!P4 BRA tail", ROWS, "BRA retry", "tail:", *TAIL]
LOOPED = [
    *HEAD,
    "retry:",
    ROWS,
    MMA,
    "@P3 BRA tail",
    "BAR.SYNC 0x0",
    "@!P4 BRA tail",
    "FADD R1, R2, R3",
    "missing:",
    ROWS,
]
LOOPED += ["@P5 BRA missing", "BRA retry", "tail:", *TAIL]
WAITING = [*HEAD, "@!P6 BRA retry", "wait:", POLL, "@P3 BRA wait", "retry:", ROWS, MMA, "@P3 BRA tail", "BAR.SYNC 0x0"]
WAITING += ["@P3 BRA decide", ROWS, "decide:", "@P4 BRA retry", "tail:", *TAIL]
WAIT_AGAIN = [*HEAD, "wait:", POLL, "@P3 BRA wait", ROWS, MMA, "BAR.SYNC 0x0", "@P4 BRA wait", *TAIL]
BARRIER = [*HEAD, "wait:", "BAR.SYNC 0x0", "@P2 BRA others", "LDG.E.STRONG.GPU R3, [R1]", "others:", "BAR.SYNC 0x0"]
BARRIER += ["@P1 BRA wait", "LDG.E.128.STRONG.GPU R4, [R1]", MMA, "STG.E.U16 [R1], R2", "@P2 BRA end"]
BARRIER += ["REDG.E.ADD.STRONG.GPU [R1], R13", "end:", *TAIL]
PEELED = [*HEAD, ROWS, MMA, "BAR.SYNC 0x0", "@!P4 BRA tail", "retry:", ROWS, MMA, "BAR.SYNC 0x0", "@P4 BRA retry"]
PEELED += ["tail:", *TAIL]
PEELED_LOOPED = [
    *HEAD,
    ROWS,
    MMA,
    "BAR.SYNC 0x0",
    "@!P4 BRA tail",
    "missing:",
    ROWS,
    "@P5 BRA missing",
    "retry:",
    ROWS,
    MMA,
]
PEELED_LOOPED += ["BAR.SYNC 0x0", "@P4 BRA retry", "tail:", *TAIL]
PARTS = [*HEAD, "wait:", POLL, "@P3 BRA wait", "retry:", ROWS, MMA, "STG.E [R1], R8", "BAR.SYNC 0x0", "@!P4 BRA done"]
PARTS += [ROWS, "BRA retry", "done:", POLL, "@P3 BRA done", "parts:", ROWS, "@P3 BRA parts", *TAIL]
STREAMED = [
    *HEAD,
    "retry:",
    "chunk:",
    ROWS,
    "LDG.E.128 R6, [R1]",
    MMA,
    "@P3 BRA chunk",
    "BAR.SYNC 0x0",
    "@!P4 BRA tail",
]
STREAMED += ["missing:", ROWS, "@P5 BRA missing", "BRA retry", "tail:", *TAIL]
HEADED = [*HEAD, "wait:", "@P3 BRA go", POLL, "BRA wait", "go:", ROWS, MMA, *TAIL]
TILES = [*HEAD, *WAITING[len(HEAD) : WAITING.index("tail:")], "STG.E.U16 [R1], R2", "@!P6 BRA second"]
TILES += [
    "wait2:",
    POLL,
    "@P3 BRA wait2",
    "second:",
    "@!P5 BRA tail",
    "retry2:",
    ROWS,
    MMA,
    "BAR.SYNC 0x0",
    "@!P4 BRA tail",
]
TILES += [ROWS, "BRA retry2", "tail:", *TAIL]
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
        (NOW, ["run p", "attempt rmb", "run s"]),
        (LOOPED, ["run p", "attempt rmb", "run s"]),
        (WAITING, ["run p", "look p", "attempt rmb", "run s"]),
        (WAIT_AGAIN, ["run p", "look p", "attempt rmb", "run s"]),
        (BARRIER, ["run p", "look bpb", "attempt pms", "run as"]),
        (PEELED, ["attempt prmb", "run s"]),
        (PARTS, ["run p", "look p", "attempt rmsb", "look p", "look r", "run s"]),
        (STREAMED, ["run p", "attempt rpmrpmrpmb", "run s"]),
        (HEADED, ["run p", "look p", "attempt rms"]),
        (TILES, ["run p", "look p", "attempt rmb", "run s", "look p", "run rmbs"]),
        (ALONE, ["attempt pms"]),
    ],
    ids=[
        "now",
        "looped",
        "waiting",
        "wait_again",
        "barrier",
        "peeled",
        "parts",
        "streamed",
        "headed",
        "tiles",
        "alone",
    ],
)
def test_a_step_that_succeeds_at_once(lines, expected):
    """LDG.STRONG.GPU of 16 bytes is a row's as well: the barrier's kernels load them past the first cache."""
    found = pieces(lines, chunks=3)
    assert [piece.replace("r", "p") for piece in found] == [piece.replace("r", "p") for piece in expected]


@pytest.mark.parametrize(
    "lines, failures, again",
    [
        (NOW, {"missing": "attempt rmbr"}, {"missing": ["attempt rm"]}),
        (LOOPED, {"missing": "attempt rmbrrr"}, {"missing": ["attempt rm"]}),
        (
            WAITING,
            {"quick": "attempt rmb", "missing": "attempt rmbr"},
            {"quick": ["attempt rmb"], "missing": ["attempt rm"]},
        ),
        (WAIT_AGAIN, {"quick": "attempt rmb"}, {"quick": ["look p", "attempt rmb"]}),
        (PEELED, {"quick": "attempt prmb"}, {"quick": ["attempt rmb"]}),
        (PEELED_LOOPED, {"missing": "attempt prmbrrr"}, {"missing": ["attempt rmb"]}),
        (PARTS, {"missing": "attempt rmsbr"}, {"missing": ["attempt rmsb"]}),
        (
            STREAMED,
            {"missing": "attempt rpmrpmrpmbrrr"},
            {"missing": ["attempt rpmrpmrpmb"]},
        ),
        (BARRIER, {}, {}),
    ],
    ids=["now", "looped", "waiting", "wait_again", "peeled", "peeled_looped", "parts", "streamed", "barrier"],
)
def test_a_step_that_fails(lines, failures, again):
    path = find_path(code(*lines), chunks=3)
    assert {kind: short(path, piece) for kind, piece in path.failures.items()} == failures
    assert {kind: [short(path, piece) for piece in back] for kind, back in path.again.items()} == again


def test_the_step_is_not_the_loop_over_tiles_nor_the_retry():
    texts = [i.text for i in step_instructions(code(*NOW))]
    assert texts.count("STG.E.U16 [R1], R2") == 1 and "STG.E [R0], R1" not in texts and "LDG.E.U16 R2, [R1]" in texts


@pytest.mark.parametrize("lines", [[], ["EXIT"], ["loop:", MMA, "@P0 BRA loop", "STG.E [R0], R1", "EXIT"]])
def test_code_without_a_step(lines):
    with pytest.raises(NoStepError, match="no loop with a store"):
        find_path(code(*lines))


def test_loops_are_natural_ones():
    graph = Graph(code(*LOOPED))
    headers = {loop.header: len(loop.blocks) for loop in graph.loops}
    assert len(headers) == 4 and max(headers.values()) == headers[0]  # tiles, steps, attempts, chunks
    assert [len(loop.blocks) for loop in graph.loops] == sorted(headers.values(), reverse=True)
