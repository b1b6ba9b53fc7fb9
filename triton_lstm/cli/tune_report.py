"""What tune prints: the best configs and their gain, every config of a shape, and plans that are not measured yet."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from triton_lstm.planning.cost import cost
from triton_lstm.planning.devices import Device
from triton_lstm.planning.limits import why_not
from triton_lstm.planning.plan import Plan
from triton_lstm.planning.problem import Problem
from triton_lstm.planning.space import candidates, space
from triton_lstm.system.terminal import print_table, say
from triton_lstm.tuning.table_file import Key, Table

if TYPE_CHECKING:
    from triton_lstm.kernels.configs import Trial

Row = dict[str, Any]
Shape = tuple[str, int, int]  # dtype, H, B


def _loops(shapes: list[Shape]) -> list[tuple[Key, Row]]:
    """Both time loops of every shape, and the columns that name them."""
    names = {False: "forward", True: "backward"}
    return [
        (Key(backward, *shape), dict(zip(("dtype", "H", "B"), shape, strict=True)) | {"direction": names[backward]})
        for shape, backward in itertools.product(shapes, (False, True))
    ]


def print_tuned(table: Table, shapes: list[Shape], device: Device) -> None:
    """What the table has for the shapes, and the gain over the cost model's plan."""
    rows = []
    for key, names in _loops(shapes):
        if key in table.plans:
            entry = table.plans[key]
            planned_us = math.nan if entry.planned_us is None else entry.planned_us
            times = {"us/step": entry.us, "planned us/step": planned_us, "gain": planned_us / entry.us}
            rows.append(names | times | {"config": str(entry.plan)})
    if rows:
        print_table(pd.DataFrame(rows))
    layers = [dataclasses.asdict(t) for t in table.layers.values() if (t.dtype, t.H, t.B) in shapes]
    if layers:
        say("a whole layer with as many inputs as hidden units, us a step; ratio above 1: faster than PyTorch's path")
        frame = pd.DataFrame(layers).drop(columns="measured")
        print_table(frame.assign(ratio=frame["torch_us"] / frame["triton_us"]))


def print_trials(title: str, trials: list[Trial], every: bool) -> None:
    """The configs that failed or were wrong; if `every`, also those measured, and why the others were not."""
    chosen = [t for t in trials if t.failed or (every and math.isfinite(t.us))]
    if chosen:
        rows = [
            {"config": str(t.plan), "predicted us": t.predicted_us, "us/step": t.us, "not measured because": t.reason}
            for t in chosen
        ]
        print_table(pd.DataFrame(rows), title)
    if every:
        _print_reasons(title, [(t.plan, t.reason) for t in trials if t.reason and not t.failed])
        both = pd.DataFrame([(t.predicted_us, t.us) for t in trials if math.isfinite(t.us)])
        if len(both) > 2:
            order = both.corr(method="spearman").iloc[0, 1]
            say(f"predicted and measured order: rank correlation {order:.2f} over {len(both)} configs")


def print_plans(device: Device, shapes: list[Shape], every: bool, model: bool = False) -> None:
    """The planned config of every shape; if `every`, also the next best, and why the others cannot run.

    model: compiles what is shown, for a model of its machine code.
    """
    say(f"{device.name}: planned and predicted, not measured. Assumes an H100's clock and caches: do not compare GPUs.")
    say("A config: exchange, rows x units of a program / chunk of the sum : slices, warps, x tiles side by side.")
    say("With `split`, so many programs have these units together, and each a part of the sum.")
    if model:
        say("Modelled from each kernel's machine code (perf/README.md), which is compiled for it: seconds each.")
    planned = []
    for key, names in _loops(shapes):
        problem = key.on(device)
        plans = candidates(problem)
        predicted = [_predicted(problem, plan, model) for plan in plans[: 10 if every else 1]]
        planned.append(names | predicted[0])
        if every:
            title = "{dtype} H={H} B={B} {direction}".format(**names)
            print_table(
                pd.DataFrame(predicted).astype(str),
                f"{title}: the best {min(10, len(plans))} of {len(plans)} that can run",
            )
            reasons = [(p, why_not(problem, p)) for p in space(problem)]
            _print_reasons(title, [(plan, reason) for plan, reason in reasons if reason])
    print_table(pd.DataFrame(planned).astype(str))


def _predicted(problem: Problem, plan: Plan, model: bool) -> Row:
    row: Row = {"config": str(plan), "predicted us/step": cost(problem, plan)}
    if model:
        from triton_lstm.perf.step.compiled import in_words

        row["modelled us/step"] = in_words(problem, plan)
    return row


def _print_reasons(title: str, dropped: list[tuple[Plan, str]]) -> None:
    """Every reason, with the configs it applies to."""
    rows: dict[str, list[str]] = {}
    for plan, reason in dropped:
        rows.setdefault(reason, []).append(str(dataclasses.replace(plan, groups=1)))
    if rows:
        frame = pd.DataFrame([{"dropped because": reason, "configs": ", ".join(p)} for reason, p in rows.items()])
        print_table(frame, f"{title}: {len(dropped)} not measured")
