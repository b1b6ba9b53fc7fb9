"""The machine code of planned kernels: compiled here, for machines that are not here. `make codegen` looks at all."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

TABLE = Path(__file__).parents[2] / "perf" / "results" / "codegen.csv"
EXACT = ("stack", "local_in_loop", "shared", "weight_loads_in_loop", "conversions", "conversions_fp32")
SAME = ("arch", "dtype", "H", "direction", "variant", "plan")
BOTH = (False, True)
USUAL = [dict(gpu=gpu, dtype="bf16", H=768, B=16) for gpu in ("A100", "RTX 3090", "H100", "B200", "RTX 5090", "MI300X")]
USUAL += [
    dict(gpu="H100", dtype="bf16", H=H, B=B)
    for H, B in ((32, 16), (64, 16), (48, 16), (650, 64), (1024, 256), (2048, 16))
]
USUAL += [dict(gpu="H100", dtype="fp16", H=768, B=16), dict(gpu="A100", dtype="tf32", H=768, B=16)]
USUAL += [dict(gpu="H100", dtype=dtype, H=768, B=64) for dtype in ("tf32", "fp32")]
USUAL += [dict(gpu="H100", dtype="bf16", H=512, B=16) | variant for variant in (dict(directions=2), dict(packed=True))]
USUAL = [case | dict(backward=backward) for case in USUAL for backward in BOTH]
USUAL += [dict(gpu="H100", dtype="bf16", H=1024, B=64, backward=True)]  # programs split the sum
YARDSTICK = dict(gpu="H100", dtype="bf16", H=768, B=16)
TWINS = [
    YARDSTICK | dict(backward=backward, exchange=exchange, limit=limit)
    for backward in BOTH
    for exchange, limit in [("barrier", 0), ("barrier", 9), ("flag", 0), ("flag", 9)]
]
TWINS += [
    dict(gpu=gpu, dtype="bf16", H=H, B=B, backward=backward, directions=directions, packed=packed)
    for gpu, H, B in (("H100", 512, 16), ("H100", 768, 64), ("A100", 256, 16))
    for backward in BOTH
    for directions, packed in ((2, False), (1, True), (2, True))
]
# Sums that programs split
TWINS += [
    dict(gpu="H100", dtype="bf16", H=1024, B=64, backward=True, limit=9, packed=True),
    dict(gpu="H100", dtype="bf16", H=1024, B=64, backward=True, exchange="flag", limit=9),
    dict(gpu="B200", dtype="tf32", H=1024, B=64, backward=True, exchange="flag", directions=2, packed=True),
    dict(gpu="RTX 5090", dtype="bf16", H=1024, B=64, backward=True, packed=True),
]
# What orders the exchange is other code on each architecture
TWINS += [
    dict(gpu=gpu, dtype="bf16", H=256, B=16, backward=backward, exchange="barrier", directions=n, packed=n == 2)
    for gpu, n in (("A100", 1), ("RTX 3090", 1), ("B200", 1), ("RTX 5090", 1), ("H100", 2), ("MI300X", 2))
    for backward in BOTH
]
TWINS += [dict(gpu="H100", dtype="bf16", H=768, B=64, backward=False, exchange="barrier")]  # rows without slices
TWINS += [dict(gpu="H100", dtype="bf16", H=2048, B=64, backward=backward) for backward in BOTH]  # wgmma
TWINS += [case | dict(backward=True, states=True) for case in (YARDSTICK, dict(gpu="A100", dtype="bf16", H=64, B=16))]
TWINS += [YARDSTICK | dict(backward=False, save=False), dict(gpu="L4", dtype="bf16", H=512, B=16, backward=False)]
RECORDED = [
    dict(gpu=gpu, dtype=dtype, H=H, B=B, backward=True, directions=directions, packed=packed)
    for gpu, dtype, H, B, directions, packed in [
        ("H100", "bf16", 768, 16, 1, False),
        ("H100", "bf16", 64, 16, 1, True),
        ("A100", "tf32", 512, 64, 2, False),
        ("B200", "fp16", 1024, 64, 1, False),
        ("MI300X", "bf16", 768, 16, 1, False),
    ]
]
# With resets: each exchange, no exchange, split sums, both directions of packed rows, weights that are streamed, AMD
SEGMENTED = [
    YARDSTICK | dict(backward=backward, exchange=exchange) for backward in BOTH for exchange in ("flag", "barrier")
]
SEGMENTED += [
    dict(gpu=gpu, dtype="bf16", H=H, B=B, backward=backward) | more
    for gpu, H, B, more in [
        ("H100", 64, 16, {}),
        ("A100", 768, 16, {}),
        ("B200", 1024, 16, {}),
        ("H100", 512, 16, dict(directions=2, packed=True)),
        ("H100", 2048, 64, {}),
        ("RTX 5090", 512, 64, dict(limit=9)),
        ("MI300X", 768, 16, {}),
    ]
    for backward in BOTH
]
SEGMENTED += [dict(gpu="H100", dtype="bf16", H=1024, B=64, backward=True)]
VOLATILE, AGAIN_B16 = "ld.volatile.global.v4.b32", "ld.volatile.global.b16"
ACQUIRE, RELAXED = "ld.acquire.gpu.global.s32", "ld.relaxed.gpu.global.s32"
AGAIN = "run `make codegen`, look at what changed, and commit the table if it is worth it"
RELEASE = "atom.global.gpu.release.add.u32"
EXCHANGES = [
    dict(gpu=g, programs=n, exchange=e) for g in ("A100", "H100") for n in (2, 32, 128) for e in ("flag", "barrier")
]
EXCHANGES += [dict(gpu="MI300X", programs=32, exchange="barrier")]


def name(case):
    return "-".join(map(str, case.values()))


@pytest.fixture(scope="module")
def reports():
    """Every case compiled in one process, by its name."""
    recorded = [case | dict(record=record) for case in RECORDED for record in ("", "elements", "sums")]
    segmented = [case | dict(resets=resets) for case in SEGMENTED for resets in BOTH]
    cases = USUAL + TWINS + recorded + segmented + EXCHANGES
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "codegen.py"), "--cases", json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(map(name, cases), map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", USUAL + TWINS, ids=name)
def test_planned_kernel(case, reports):
    """Nothing spilled in a step; no more shared memory, and no other loads and products, than planned."""
    report = reports[name(case)]
    assert report["problems"] == []


@pytest.mark.parametrize("record", ["elements", "sums"])
@pytest.mark.parametrize("case", RECORDED, ids=name)
def test_recording_changes_no_arithmetic(case, record, reports):
    """The same products, sums and fused ones with and without it, so that the gradients have the same bits; the sums of
    squares are float64's."""
    plain, recorded = (reports[name(case | dict(record=r))] for r in ("", record))
    assert recorded["problems"] == []
    if case["gpu"] != "MI300X":
        assert plain["arithmetic"]["FFMA"] > 0 < plain["arithmetic"]["MUFU"]
        added = ["FADD"] if record == "sums" else []  # |x|
        assert [k for k, n in plain["arithmetic"].items() if recorded["arithmetic"][k] != n and k not in added] == []
        assert recorded["instructions"] > plain["instructions"]


@pytest.mark.parametrize("case", USUAL + TWINS, ids=name)
def test_without_resets_no_instruction_is_of_segments(case, reports):
    assert not reports[name(case)]["segments"]


@pytest.mark.parametrize("case", SEGMENTED, ids=name)
def test_resets_take_a_few_instructions(case, reports):
    """No more products, layouts and shared memory; where the tile has more rows than a warp has threads, its warps tell
    each other which begin a segment."""
    plain, report = (reports[name(case | dict(resets=resets))] for resets in BOTH)
    assert report["problems"] == [] and report["segments"] and not plain["segments"]
    assert report["conversions"] == plain["conversions"] and report["shared"] == plain["shared"]
    if case["gpu"] == "MI300X":
        return
    rows = int(report["plan"].split()[1].split("x")[0])
    assert report["barriers"] - plain["barriers"] <= (2 if rows > 32 else 0)
    assert report["instructions"] < plain["instructions"] + 120
    for kind in ("MMA", "MUFU", "FFMA"):
        assert report["arithmetic"][kind] == plain["arithmetic"][kind]


def row_before(report):
    """A kernel's row of the committed table."""
    with TABLE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row[c] == str(report[c]) for c in SAME)]
    assert rows, f"the plan is another; {AGAIN}"
    if rows[0]["triton"] != triton.__version__:
        pytest.skip(f"the table is Triton {rows[0]['triton']}'s")
    return rows[0]


@pytest.mark.parametrize("case", USUAL, ids=name)
def test_no_worse_than_before(case, reports):
    """Against the committed table: a change for the worse is at least a change on purpose."""
    report = reports[name(case)]
    row = row_before(report)
    if row["barriers"]:
        assert report["barriers"] == int(float(row["barriers"])), f"a barrier more or less; {AGAIN}"
    for column in EXACT:
        if row[column]:
            assert report[column] <= int(float(row[column])), f"{column} grew; {AGAIN}"
    for column in ("registers", "instructions"):
        if row[column]:
            assert report[column] <= 1.02 * float(row[column]), f"{column} grew; {AGAIN}"


@pytest.mark.parametrize("case", USUAL, ids=name)
def test_no_slower_than_before(case, reports):
    """By the model of a step."""
    from codegen import slower

    report = reports[name(case)]
    row = row_before(report)
    if not row.get("cycles") or row["B"] != str(report["B"]):
        pytest.skip(f"the table has no cycles of this kernel at B={report['B']}")
    assert slower(report, row) == [], AGAIN


def test_what_is_slower_is_said_with_its_numbers(reports):
    from codegen import slower

    report = reports[name(YARDSTICK | dict(backward=False))]
    before = {column: str(report[column]) for column in ("B", "cycles", "cycles_waiting")}
    assert slower(report, before) == []
    assert slower(report | dict(cycles=1.019 * report["cycles"]), before) == []
    (said,) = slower(report | dict(cycles_waiting=9e9), before)
    assert said == f"cycles_waiting: 9000000000.0, before {report['cycles_waiting']}"
    assert len(slower(report, before | dict(cycles="1", cycles_waiting="1"))) == 2
    assert slower(report, before | dict(cycles="", cycles_waiting="")) == []  # where there is no model
    assert slower(report, before | dict(B="1024", cycles="1")) == []


@pytest.mark.parametrize("case", EXCHANGES, ids=name)
def test_bare_exchange(case, reports):
    """Loads, atomics and barriers as in the LSTM's kernels, which wait with the same functions."""
    report = reports[name(case)]
    assert report["stack"] == 0 and report["problems"] == [], report


def test_every_kind_of_plan_was_seen(reports):
    plans = [(r["arch"], r["exchange"], r["resident"]) for r in reports.values() if "plan" in r]
    assert {("sm_90", "none", True), ("sm_90", "flag", True), ("sm_90", "barrier", False)} <= set(plans)
    assert any(arch == "gfx942" and exchange == "barrier" for arch, exchange, _ in plans)
    assert any(r.get("wgmma") for r in reports.values())
    split = {(r["arch"], r["dtype"], r["exchange"]) for r in reports.values() if r["told"]}
    assert {("sm_80", "tf32", "barrier"), ("sm_90", "bf16", "barrier"), ("sm_90", "bf16", "flag")} <= split
    assert {("sm_90", "tf32", "barrier"), ("sm_120", "bf16", "barrier"), ("sm_100", "tf32", "flag")} <= split


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(local_in_loop=4, stack=16), "4 local-memory instructions in the time loop, 16 bytes of stack"),
        (dict(weight_loads_in_loop=1), "resident, but 1 loads of W_hh"),
        (dict(shared=170_000), "shared memory 170000, planned"),
        (dict(tensor_core=0), "no matrix instruction"),
        (dict(wgmma=8), "8 wgmma, planned: False"),
        (dict(polls="b32 v4.b32"), "planned: 16 bytes a load"),
        (dict(polls=""), "polls nothing"),
        (dict(reads={VOLATILE: 7, "ld.global.v4.b32": 1}), "'ld.global.v4.b32': 1}, wanted: "),
        (dict(reads={VOLATILE: 1}), "bytes a thread by ld"),
        (
            dict(reads={VOLATILE: 12, AGAIN_B16: 95}),
            "190 bytes a thread are loaded again where they are missing, wanted: 192",
        ),
        (dict(counter=[RELEASE]), "the counter is used by ['atom.global.gpu.release"),
        (dict(counter=[RELAXED]), "the counter is used by ['ld.relaxed"),
        (dict(counter=[RELAXED, RELEASE]), "the counter is used by ['ld.relaxed"),
        (dict(order="ARRWL"), "between the rows' stores and `arrive`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_said_with_its_numbers(change, says, reports):
    from codegen import problems

    good = reports[name(YARDSTICK | dict(backward=False, exchange="flag", limit=0))]
    assert says in "; ".join(problems(good | change))


@pytest.mark.parametrize(
    "change, right",
    [
        ({}, True),
        ({"st.global.v2.b64": 3}, False),  # a part that is not told
        ({"st.global.v2.b64": 5}, False),
        ({"st.global.v2.b64": 2, "st.global.b64": 4}, True),
        ({"st.global.v2.b64": 0, "st.global.v4.b32": 4}, False),  # a value may be seen without its number
        ({"ld.volatile.global.v2.b64": 3}, False),
        ({"ld.volatile.global.b64": 0}, False),
        ({"ld.volatile.global.v2.b64": 0, "ld.volatile.global.v4.b32": 4}, False),
        ({"ld.volatile.global.v2.b64": 0, "ld.volatile.global.b64": 9}, True),
        ({"ld.volatile.global.v2.b64": 0, "ld.global.v2.b64": 4}, False),  # out of a cache that nobody keeps right
        ({"ld.volatile.global.v2.b64": 3, "ld.global.cg.v2.b64": 1}, False),  # which may be read once for all looks
        ({"atom.global.gpu.relaxed.exch.b64": 1}, False),
    ],
    ids=str,
)
def test_words_of_parts_are_whole(change, right, reports):
    from codegen import problems

    good = reports[name(dict(gpu="H100", dtype="bf16", H=1024, B=64, backward=True))]
    stored, waited, loaded = "st.global.v2.b64", "ld.volatile.global.b64", "ld.volatile.global.v2.b64"
    assert problems(good) == [] and good["words"] == {stored: 4, waited: 1, loaded: 4}
    found = problems(good | dict(words=good["words"] | change))
    assert (found == []) == right and all("64 bytes a thread told and 72 read" in problem for problem in found)
    assert problems(good | dict(told=0, read=0)) != []  # no kernel has words without splits
    assert "48 bytes of words are whole in machine code, wanted: 64" in "; ".join(
        problems(good | dict(exchange="barrier", whole=48))
    )


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(reads={"ld.global.v4.b32": 4}), "wanted: "),  # which may look into a cache that nobody keeps right
        (dict(counter=[ACQUIRE]), "the counter is used by"),
        (dict(counter=[ACQUIRE, RELEASE, RELEASE]), "the counter is used by"),
        (dict(counter=[ACQUIRE, RELEASE.replace("release", "relaxed")]), "gpu.relaxed.add"),
        (dict(counter=[RELAXED, RELEASE]), "ld.relaxed.gpu"),
        (dict(counter=[ACQUIRE, RELEASE.replace("gpu", "cta")]), "cta.release"),
        (dict(order="ARRWL"), "between the rows' stores and `arrive`"),
        (dict(order="RAWBL"), "between `wait` and the rows' loads"),
        (dict(order="RRWBLA"), None),  # the same loop from another place
        (dict(counter=[RELEASE, ACQUIRE], order="ABRRWBL"), None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_lets_a_barrier_exchange_go_wrong_is_said(change, says, reports):
    from codegen import problems

    good = reports[name(YARDSTICK | dict(backward=False, exchange="barrier", limit=0))]
    assert problems(good) == []
    assert says in "; ".join(problems(good | change)) if says else problems(good | change) == []


@pytest.mark.parametrize(
    "order, says",
    [
        ("BABRRBWBL", "between `wait` and the rows' loads"),  # of which one hands out what one thread saw
        ("BABBRRBWL", "between the rows' stores and `arrive`"),
        ("BRRBWBLBAB", None),
    ],
)
def test_where_one_thread_waits_for_all_a_barrier_tells_the_others(order, says, reports):
    from codegen import problems

    good = reports[name(YARDSTICK | dict(backward=False, exchange="barrier", limit=9))]
    assert problems(good) == []
    found = "; ".join(problems(good | dict(order=order)))
    assert says in found if says else not found
