"""Kernels with one thing taken out or weakened: the emulator or the results show it. See
docs/explanation/ptx_mutants.md."""

import json
import os
import subprocess
import sys

import pytest
import torch
from child import TESTS, python_path

if torch.cuda.is_available():
    pytest.skip("the kernels run on the GPU that is here", allow_module_level=True)

RACE, SHARED, UNWRITTEN, RESULTS, DEADLOCK, FLIGHT, SPLIT = (
    "race between programs",
    "race in shared memory",
    "unwritten",
    "results",
    "deadlock",
    "in flight",
    "split elements",
)
# Case, mutation, at which share of its places, and what notices it: one of these
FEW = [
    ("one program forward", "bar.sync taken out", 1, SHARED),
    ("one program forward", "a global load for all", 1, "out of bounds"),
    ("one program forward", "a shared store's address", 0.5, SHARED, UNWRITTEN, RESULTS),
    ("one program forward", "fma's factor and term exchanged", 1, RESULTS),
    ("one program forward", "rounded towards zero", 0, "refused"),
    ("one program backward", "bar.sync of a warp only", 0, SHARED),
    ("one program backward", "ldmatrix without .trans", 0, RESULTS),
    ("one program backward", "B's halves exchanged", 0.5, RESULTS),
    ("flag forward", "unchanged", 0, ""),
    ("flag forward", "a volatile load is plain", 0, RACE),
    ("flag forward", "a volatile load is .cg", 1, RACE),
    ("flag forward", "a volatile load's scope is its program", 0, RACE),
    ("flag forward", "a register of rows is not looked at", 0.5, RESULTS),
    ("flag forward", "no register of rows is looked at", 0, RESULTS),
    ("flag forward", "what is missing is loaded again once", 0, RESULTS),
    ("flag forward", "what is missing is not loaded again", 0, DEADLOCK),
    ("flag forward", "bar.sync taken out", 0.5, SHARED),
    ("flag forward", "bar.sync under a condition", 1, "refused"),
    ("flag forward", "the buffer is not filled", 0, UNWRITTEN),
    ("flag in slices forward", "the end of a step's rows is filled with 0", 0, RESULTS),
    ("flag forward", "nothing is looked at again", 0, RESULTS),
    ("flag backward", "a volatile load is plain", 0.5, RACE),
    ("flag backward", "complete from the first step on", 0, RESULTS),
    ("barrier forward", "unchanged", 0, ""),
    ("barrier forward", "release becomes relaxed", 0, RACE),
    ("barrier forward", "the release's scope is its program", 0, RACE),
    ("barrier forward", "acquire becomes relaxed", 0, RACE),
    ("barrier forward", "the acquire's scope is its program", 0, RACE),
    ("barrier forward", "both scopes are the program", 0, RACE),
    ("barrier forward", "bar.sync taken out", 1, RACE),
    ("barrier forward", "no barrier before arrive", 0, RACE),
    ("barrier forward", "arrive adds 2", 0, RACE, UNWRITTEN),
    ("barrier forward", "one copy is not told", 0, DEADLOCK),
    ("barrier forward", "wait's target is one less", 0, RACE, UNWRITTEN),
    ("barrier forward", "wait's target is one more", 0, DEADLOCK),
    ("barrier forward", "the counter is not zeroed", 0, DEADLOCK, UNWRITTEN),
    ("barrier backward", "unchanged", 0, ""),
    ("barrier backward", "acquire becomes relaxed", 0, RACE),
    ("barrier backward", "wait does not acquire", 0, RACE),
    ("flag split backward", "unchanged", 0, ""),
    ("flag split backward", "a volatile load is plain", 1, RACE),
    ("flag split backward", "words are not cleared", 0, UNWRITTEN),
    ("flag split backward", "words of a launch before are left", 0, RESULTS),
    ("flag split backward", "a word's number is not compared", 0, RESULTS),
    ("flag split backward", "the number of two steps before will do", 0, RESULTS),
    ("flag split backward", "parts are added in another order", 0, RESULTS),
    ("flag split backward", "a part of another split", 0, RESULTS),
    ("flag split backward", "a word is stored in halves", 0, SPLIT),
    ("barrier split backward", "unchanged", 0, ""),
    ("barrier split backward", "a volatile load's scope is its program", 0, RACE),
    ("barrier split backward", "parts are looked at once", 0, RESULTS),
    ("barrier split backward", "a word is loaded in halves", 0, SPLIT),
    ("segments forward", "unchanged", 0, ""),
    ("segments forward", "where a segment begins nobody waits", 0, RACE, UNWRITTEN),
    ("segments forward", "rows before a segment are read", 0, RACE, UNWRITTEN, RESULTS),
    ("segments forward", "a bit of another row", 0, RESULTS, UNWRITTEN),
    ("segments backward", "unchanged", 0, ""),
    ("segments backward", "of every second row", 0, RESULTS),
    ("segments backward", "of the row before", 0, RESULTS),
    ("wgmma forward", "unchanged", 0, ""),
    ("wgmma forward", "fence.proxy.async taken out", 0, FLIGHT),
    ("wgmma forward", "wgmma.fence taken out", 0, FLIGHT),
    ("wgmma forward", "commit_group taken out", 0, FLIGHT),
    ("wgmma forward", "wait_group taken out", 0, FLIGHT),
    ("wgmma forward", "wait_group 0 becomes 1", 0, FLIGHT),
    ("wgmma forward", "the sums so far are not added", 0, RESULTS),
    ("wgmma forward", "B's layout turned around", 0, RESULTS, UNWRITTEN),
    ("wgmma backward", "wait_group taken out", 1, FLIGHT),
    ("wgmma backward", "fence.proxy.async taken out", 0, FLIGHT),
]


def scan(*arguments):
    """The rows that `python -m ptx.scan` prints, in a process that does not interpret kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = python_path(TESTS, TESTS / "helpers")
    command = [sys.executable, "-W", "ignore", "-m", "ptx.scan", *arguments]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def few():
    rows = scan("--some", json.dumps([mutant[:3] for mutant in FEW]))
    return dict(zip([mutant[:2] for mutant in FEW], rows, strict=True))


@pytest.mark.parametrize(
    "case, mutation, share, by", [(*m[:3], m[3:]) for m in FEW], ids=lambda v: v if isinstance(v, str) else ""
)
def test_mutant(case, mutation, share, by, few):
    row = few[case, mutation]
    assert row["by"] in by, row


@pytest.mark.full
def test_all_mutants_but_those_with_a_reason_are_noticed():
    rows = scan("--all")
    assert len(rows) > 1000
    assert [row for row in rows if not row["by"] and not row["reason"]] == []
