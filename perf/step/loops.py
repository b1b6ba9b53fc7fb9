"""Time loops that the cost model is fitted to and compared with: measured ones, and many more that are modelled."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from triton_lstm.perf.step.constants import FITTED
from triton_lstm.planning.cost import beyond_l2, cost
from triton_lstm.planning.devices import GPUS, known_gpu
from triton_lstm.planning.limits import held, loads_too_little, why_impossible
from triton_lstm.planning.plan import Plan
from triton_lstm.planning.problem import Problem
from triton_lstm.planning.space import make_plan, space, with_groups

RESULTS = Path(__file__).parents[1] / "results"
MODELLED = RESULTS / "modelled_loops.csv"
MEASURED = RESULTS / "nvidia_h200" / "time_loops.csv"
TARGETS = ("A100", "H100", "B200", "RTX 5090")
PRECISIONS = ("bf16", "tf32")
HIDDEN = (32, 64, 128, 256, 512, 768, 1024, 1536, 2048)
BATCHES = (1, 16, 64, 128, 256, 1024)
USUAL = ((128, 16), (128, 64), (256, 64), (512, 64), (512, 256), (768, 16), (768, 256), (1024, 64), (1024, 256))  # H, B
PROBLEMS, CHEAP, OTHERS = 48, 6, 5  # of each problem the cheapest plans, each of another shape, and any others
DEAREST = 5.0  # of all plans that are looked at, by the cost model, times the cheapest
MOST_SUMS = 128  # in a thread: more are sure to spill


class TimeLoop(NamedTuple):
    """us: of a step of the whole batch. local: accesses to spilled registers in a step, of those that are modelled."""

    problem: Problem
    plan: Plan
    us: float
    local: int = 0


_FIELDS = dataclasses.fields(Plan)
COLUMNS = ("gpu", "dtype", "H", "B", "direction", *(field.name for field in _FIELDS), "us", "local")


def problems() -> list[Problem]:
    """Usual ones on an H100, and some of all GPUs, precisions and sizes; always the same ones."""
    every = [*itertools.product(TARGETS, PRECISIONS, BATCHES, HIDDEN, (False, True))]
    usual = [
        ("H100", precision, B, H, backward) for precision in PRECISIONS for H, B in USUAL for backward in (False, True)
    ]
    chosen = dict.fromkeys([*usual, *random.Random(0).sample(every, PROBLEMS)])
    return [Problem(GPUS[gpu], precision, B, H, backward) for gpu, precision, B, H, backward in chosen]


def plans(problem: Problem) -> list[Plan]:
    """The planned one, cheap ones of every shape, also such that `why_not` expects to spill, and some by chance."""
    every = [with_groups(problem, plan) for plan in space(problem) if _is_worth_compiling(problem, plan)]
    if not every:
        return []
    every.sort(key=lambda plan: cost(problem, plan).us)
    cheapest: dict[Plan, Plan] = {}
    for plan in every:
        cheapest.setdefault(dataclasses.replace(plan, block_k=16, exchange="flag"), plan)
    most = DEAREST * cost(problem, every[0]).us
    others = [plan for plan in every if cost(problem, plan).us < most]
    by_chance = random.Random(0).sample(others, min(OTHERS, len(others)))
    planned = [make_plan(problem)] if make_plan(problem) in every else []
    return [*dict.fromkeys([*planned, *list(cheapest.values())[:CHEAP], *by_chance])]


def _is_worth_compiling(problem: Problem, plan: Plan) -> bool:
    if not plan.resident and beyond_l2(problem):  # there is no model of device memory
        return False
    if why_impossible(problem, plan) or loads_too_little(problem, plan):
        return False
    return plan.exchange == "none" or held(problem, plan).sums <= MOST_SUMS


def model(of: tuple[Problem, Plan]) -> TimeLoop | str:
    """With the constants fitted to measured times; or the reason why there is no model."""
    from triton_lstm.perf.step.compiled import modelled  # no sooner: TRITON_INTERPRET may have been set

    try:
        (step,) = modelled(*of, FITTED)
    except Exception as error:  # the compiler's are of many kinds
        return f"{of[0].device.arch} {of[1]}: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return TimeLoop(*of, step.us(step.waiting), step.local)


def write(path: Path, found: Iterable[TimeLoop | str]) -> None:
    """What could not be modelled goes to the error stream. Raises ValueError, and writes nothing, if that is all."""
    short = {device: name for name, device in GPUS.items()}
    rows: list[tuple[Any, ...]] = []
    for one in found:
        if isinstance(one, str):
            print(one, file=sys.stderr)
            continue
        device, precision, B, H, backward, _ = one.problem
        about = short[device], precision, H, B, "backward" if backward else "forward"
        rows.append((*about, *dataclasses.astuple(one.plan), f"{one.us:.3f}", one.local))
    if not rows:
        raise ValueError("no kernel could be modelled")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def read_modelled(path: Path = MODELLED) -> list[TimeLoop]:
    """Empty where there is no file. Raises ValueError for one with other columns, GPUs or values."""
    loops = []
    for row in _rows(path) if path.exists() else []:
        if missing := set(COLUMNS) - {name for name, value in row.items() if value}:
            raise ValueError(f"{path} has no {', '.join(sorted(missing))} in some row; delete it to make it anew")
        fields = {field.name: _parsed(row[field.name]) for field in _FIELDS}
        loops.append(TimeLoop(_problem(row, row["gpu"]), Plan(**fields), float(row["us"]), int(row["local"])))
    return loops


def read_measured(path: Path = MEASURED) -> list[TimeLoop]:
    """Those of the present kernels. Raises ValueError for a plan that cannot be read."""
    pattern = re.compile(r"(\w+) (\d+)x(\d+)/(\d+):(\d+) w(\d+)(?: split (\d+))?(?: x(\d+))?( streamed)?$")
    loops = []
    for row in _rows(path):
        if row["kernels"] != "now":
            continue
        if not (match := pattern.match(row["plan"])):
            raise ValueError(f"{path}: cannot read the plan {row['plan']!r}")
        exchange: Any
        exchange, *texts, streamed = match.groups()
        block_b, block_h, block_k, slices, warps, splits, groups = (int(text or 1) for text in texts)
        plan = Plan(exchange, True, not streamed, block_b, block_h, block_k, slices, groups, warps, splits)
        loops.append(TimeLoop(_problem(row, "H200"), plan, float(row["us"])))
    return loops


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _problem(row: dict[str, str], gpu: str) -> Problem:
    return Problem(known_gpu(gpu), row["dtype"], int(row["B"]), int(row["H"]), row["direction"] == "backward")


def _parsed(text: str) -> Any:
    return int(text) if text.isdigit() else {"True": True, "False": False}.get(text, text)
