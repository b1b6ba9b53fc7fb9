"""Runs mutants of small kernels, and says what notices them, a line of JSON for each.

`python -m ptx.scan --all --table docs/explanation/ptx_mutants.md` takes an hour. The process must not interpret kernels
(TRITON_INTERPRET).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from triton_lstm.kernels import lstm_backward, lstm_forward
from triton_lstm.planning.plan import Plan

from . import gpu, machine
from .faults import Fault, UnknownInstructionError
from .mutants import LONE_ELEMENT, ORDER, PYTHON, TEXT, UNCHANGED, Host, Mutation, Source
from .schedule import Schedule
from .survivors import Row, reason, table

Array = np.ndarray
T, H = 3, 64


class Case(NamedTuple):
    """A launch of one kernel."""

    name: str
    gpu: str
    plan: Plan
    backward: bool = False
    dtype: torch.dtype = torch.bfloat16
    hidden: int = H
    steps: int = T
    resets: bool = False

    @property
    def exchanges(self) -> set[str]:
        """What is exchanged, as mutations name it."""
        kind = self.plan.exchange
        parts = set() if self.plan.splits == 1 else {"parts", f"parts by {kind}"}
        return {kind, *parts} | ({"segments"} if self.resets else set())

    @property
    def rows(self) -> int:
        """Of the batch: some of the tile's are padding."""
        return self.plan.block_b - 3


def _both(name: str, device: str, forward: Plan, backward: Plan, **more: Any) -> list[Case]:
    return [
        Case(f"{name} {('forward', 'backward')[k]}", device, p, bool(k), **more)
        for k, p in enumerate((forward, backward))
    ]


SPLIT, SPLIT_BARRIER = (Plan(kind, True, True, 16, 32, 32, 1, 1, 2, splits=4) for kind in ("flag", "barrier"))
CASES = {
    case.name: case
    for case in [
        *_both("one program", "A100", *[Plan("none", True, True, 16, 64, 64, 1, 1, 4)] * 2),
        *_both("flag", "A100", *[Plan("flag", True, True, 16, 16, 64, 1, 1, 4)] * 2),
        Case("flag in slices forward", "A100", Plan("flag", True, True, 16, 8, 64, 4, 1, 4)),
        Case("flag in slices backward", "A100", Plan("flag", True, True, 16, 8, 128, 4, 1, 4), True),
        *_both("barrier", "A100", *[Plan("barrier", True, True, 16, 8, 64, 4, 1, 4)] * 2),
        *_both("segments", "A100", *[Plan("barrier", True, True, 16, 16, 64, 1, 1, 4)] * 2, resets=True),
        *_both("wgmma", "H100", *[Plan("flag", True, True, 64, 32, 64, 1, 1, 4)] * 2),
        Case("float32 forward", "A100", Plan("flag", True, True, 16, 16, 64, 1, 1, 4), dtype=torch.float32),
        Case("cut off forward", "A100", Plan("flag", True, True, 16, 16, 64, 1, 1, 4), hidden=50),
        # The last program has no unit; words of steps 0, 2 and 4 have one place
        Case("flag split backward", "A100", SPLIT, True, hidden=24, steps=5),
        Case("barrier split backward", "A100", SPLIT_BARRIER, True, hidden=24, steps=5),
    ]
}  # fmt: skip


@dataclasses.dataclass
class Launch:
    """A launch that was recorded, with the values of its arguments before it."""

    ptx: str
    arguments: list[Any]
    before: list[Array | None]
    grid: tuple[int, int, int]
    shared: int
    options: dict[str, Any]

    def run(self, ptx: str, schedule: Schedule) -> list[Array]:
        """The values of all arguments afterwards, without the words of parts, which nobody reads then. Raises Fault."""
        for argument, values in zip(self.arguments, self.before, strict=True):
            if values is not None:
                argument[1][:] = values
        machine.run(_kernel(ptx), self.arguments, self.grid, self.shared, **self.options | dict(schedule=schedule))
        results = [argument for argument in self.arguments if not isinstance(argument, int)]
        return [argument[1].copy() for argument in results if argument[0] != "parts_ptr"]


@functools.lru_cache(maxsize=4)
def _kernel(ptx: str) -> machine.Kernel:
    return machine.Kernel(ptx)


@dataclasses.dataclass
class Bounded(Schedule):
    """A schedule in which no launch goes on for more than `limit` turns of programs.

    only_straggler: all of memory is in order but for the straggler.
    """

    limit: int = 1 << 62
    turns: int = 0
    only_straggler: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.only_straggler:
            self.lateness, self.delays = 1.0, np.zeros_like(self.delays)

    def switch(self, program: int, access: int) -> int | None:
        self.turns += 1
        if self.turns > self.limit:
            raise Fault("a launch that never ends")
        return super().switch(program, access)


def record(case: Case, mutation: Source | Host | None = None) -> Launch:
    """What a case launches, which is not run."""
    made: list[Launch] = []
    texts: list[str] = []

    def keep(kernel: Any, arguments: list[Any], grid: tuple[int, int, int], shared: int, **options: Any) -> None:
        before = [None if isinstance(a, int) else a[1].copy() for a in arguments]
        made.append(Launch(texts[-1], arguments, before, grid, shared, options))

    torch.manual_seed(0)
    wide, hidden, rows, T = torch.promote_types(case.dtype, torch.float32), case.hidden, case.rows, case.steps
    w = ((2 * torch.rand(4 * hidden, hidden) - 1) * hidden**-0.5).to(case.dtype)
    c0 = torch.randn(1, rows, hidden, dtype=wide)
    given = torch.randn(T, rows, 4 * hidden).to(case.dtype)
    given = given.sigmoid() if case.backward else given
    given[1, 1, 5] = float("nan")  # makes a product that is NaN, and complete
    resets = None
    if case.resets:
        resets = torch.zeros(T, rows, dtype=torch.bool)
        resets[1, ::2] = resets[2] = True
    with (
        mock.patch.object(gpu, "run", keep),
        mutation.applied() if mutation else nullcontext(),
        gpu.gpu(case.gpu, edit=lambda ptx: texts.append(ptx) or ptx),
    ):
        if case.backward:
            dy, c_all = torch.randn(T, rows, hidden).to(case.dtype), torch.randn(T, rows, hidden, dtype=wide)
            dc_n = torch.randn_like(c0)
            lstm_backward(dy, None, dc_n, w, c0, given, c_all, resets=resets, plan=case.plan)
        else:
            h0 = torch.randn(1, rows, hidden).to(case.dtype)
            lstm_forward(given, w, h0, c0, resets=resets, plan=case.plan, save_gates=True, save_c=True)
    (launch,) = made
    return launch


class Verdict(NamedTuple):
    """by: what noticed a mutant, in a word, "" if nothing did. text: what was reported."""

    by: str
    memory: str
    text: str


KINDS = {
    "race in shared memory": "in shared memory, byte",
    "race between programs": "a race on",
    "unwritten": "nobody wrote",
    "out of bounds": r"bytes at|an input|misaligned",
    "split elements": "splits elements",
    "deadlock": "wait for each other forever|never ends",
    "barrier": "not all threads reach",
    "in flight": "not waited for|may still read|wgmma.fence|fence.proxy.async",
    "two stores": "at once",
    "refused": "is not known",
}


def verdict(right: list[Array], launch: Launch, ptx: str, schedules: list[Schedule]) -> Verdict:
    """Of one mutant, whose launch should leave `right` in its arguments."""
    for schedule in schedules:
        memory = "weak" if schedule.weak else "sequential"
        try:
            after = launch.run(ptx, copy.deepcopy(schedule))
        except Fault as fault:
            lines = str(fault).splitlines()
            text = lines[min(1, len(lines) - 1)]
            by = next((kind for kind, pattern in KINDS.items() if re.search(pattern, text)), "other")
            return Verdict(by, memory, text)
        except UnknownInstructionError as unknown:
            return Verdict("refused", memory, str(unknown))
        if not all(map(np.array_equal, after, right)):
            return Verdict("results", memory, "other results")
    return Verdict("", "", "")


def schedules(case: Case, mutation: Mutation | Source | Host, limit: int) -> list[Schedule]:
    """What a mutant is run with, until something notices it."""
    found: list[Schedule] = [Bounded(seed=0, limit=limit)]
    if case.plan.exchange == "none":
        return found
    weak = 4 if case.plan.exchange == "flag" else 2
    found += [Bounded(seed=seed, weak=True, limit=limit) for seed in range(1, 1 + weak)]
    if case.plan.exchange == "flag":
        columns = (4 if case.backward else 1) * case.hidden
        step = case.rows * columns
        chunks = range(0, columns, case.plan.block_k)
        last = [step - 1, *chunks]  # an element of a step's rows that is seen last
        if (
            mutation.name == LONE_ELEMENT
        ):  # it must be this one: of 8 in each load of 16 rows and a chunk of the columns
            rows = range(0, case.rows, 16)
            last = [row * columns + chunk + k for row in rows for chunk in chunks for k in range(8)]
            found = []
        found += [Bounded(seed=3, weak=True, limit=limit, straggler=(step, k), only_straggler=True) for k in last]
    if case.plan.splits > 1 and mutation.group != ORDER:  # of each split one of a thread's two words is seen last
        words = case.plan.block_b * case.plan.block_h // case.plan.splits
        last = [split * words + k for split in range(case.plan.splits) for k in range(2)]
        among = case.plan.splits * words
        found += [Bounded(seed=3, weak=True, limit=limit, straggler=(among, k), only_straggler=True) for k in last]
    return found


class Unmutated:
    """A case's launch as it is, and what it leaves in its arguments."""

    def __init__(self, case: Case) -> None:
        self.case, self.launch = case, record(case)
        schedule = Bounded(seed=0)
        self.right = self.launch.run(self.launch.ptx, schedule)
        self.limit = 8 * schedule.turns

    def mutants(self, mutation: Mutation | Source | Host) -> list[tuple[str, Launch, str]]:
        """(where, the launch, its PTX)"""
        if isinstance(mutation, Mutation):
            return [(where, self.launch, ptx) for where, ptx in mutation.mutants(self.launch.ptx)]
        if mutation.exchange not in self.case.exchanges:
            return []
        launch = record(self.case, mutation)
        return [("", launch, launch.ptx)]

    def row(self, mutation: Mutation | Source | Host, where: str, launch: Launch, ptx: str) -> Row:
        found = verdict(self.right, launch, ptx, schedules(self.case, mutation, self.limit))
        return Row(self.case.name, mutation.group, mutation.name, where, *found)


MUTATIONS: dict[str, Mutation | Source | Host] = {m.name: m for m in (UNCHANGED, *TEXT, *PYTHON)}


@functools.lru_cache(maxsize=1)
def unmutated(case: str) -> Unmutated:
    return Unmutated(CASES[case])


def some(wanted: list[tuple[str, str, float]]) -> Iterator[Row]:
    """wanted: of each mutant the case, the mutation, and at which share of its places, 0 to 1, it is made."""
    for case, name, share in wanted:
        it, mutation = unmutated(case), MUTATIONS[name]
        mutants = it.mutants(mutation) if name != UNCHANGED.name else [("", it.launch, it.launch.ptx)]
        if not mutants:
            yield Row(case, mutation.group, name, "", "", "", "nowhere in this kernel")
        else:
            yield it.row(mutation, *mutants[round(share * (len(mutants) - 1))])


def everything(cases: list[str]) -> Iterator[Row]:
    """All mutants of what orders; of the others, as many of each mutation as MOST says."""
    for case in cases:
        it = unmutated(case)
        for mutation in MUTATIONS.values():
            mutants = it.mutants(mutation)
            step = max(1, -(-len(mutants) // mutation.most))
            for mutant in mutants[::step]:
                yield it.row(mutation, *mutant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--some", type=json.loads, help="[[case, mutation, share of its places], ..]")
    parser.add_argument("--all", nargs="*", metavar="CASE", help="all mutants, of all cases if none is named")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="the lines of an earlier run")
    parser.add_argument("--table", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows = []
    with mock.patch.object(machine, "ENDLESS", 3000):
        for row in _asked_for(arguments):
            rows.append(row)
            print(json.dumps(row._asdict() | dict(reason="" if row.by else reason(row))), flush=True)
    if arguments.table:
        arguments.table.write_text(table(rows) + "\n")


def _asked_for(arguments: argparse.Namespace) -> Iterator[Row]:
    if arguments.rows:
        for line in arguments.rows.read_text().splitlines():
            row = json.loads(line)
            yield Row(*[row[name] for name in Row._fields])
    elif arguments.some is not None:
        yield from some(arguments.some)
    else:
        yield from everything(arguments.all or list(CASES))


if __name__ == "__main__":
    main()
