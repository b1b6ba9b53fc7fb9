"""What tune shows: the best configs and their gain, every config of a shape, and plans that nobody has measured."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import pandas as pd

from triton_lstm.cost import cost
from triton_lstm.devices import Device
from triton_lstm.limits import why_not
from triton_lstm.perf.report import print_table
from triton_lstm.plan import candidates, space
from triton_lstm.table_file import Key, Table

if TYPE_CHECKING:
    from triton_lstm.kernels.configs import Trial

Row = dict[str, Any]
Shape = tuple[str, int, int]  # dtype, H, B
_ITEMSIZE = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 8}


def itemsize_on(device: Device, dtype: str) -> int:
    """make_plan's, of a dtype on a known GPU."""
    return _ITEMSIZE[dtype] if device.backend == "cuda" else min(4, _ITEMSIZE[dtype])


def row_of(key: Key) -> Row:
    return {"dtype": key.dtype, "H": key.H, "B": key.B, "direction": "backward" if key.backward else "forward"}


def print_tuned(table: Table, shapes: list[Shape], device: Device, failed: list[Row]) -> None:
    rows = []
    for (dtype, hidden_size, batch), backward in itertools.product(shapes, (False, True)):
        entry = table.plans.get(Key(backward, dtype, hidden_size, batch))
        if entry:
            times = {"us/step": entry.us, "planned us/step": entry.planned_us, "gain": entry.planned_us / entry.us}
            plan = entry.plan.on(device, itemsize_on(device, dtype), batch, hidden_size, backward)
            rows.append(row_of(entry.key) | times | {"config": plan.describe(hidden_size)})
    if rows:
        print_table(pd.DataFrame(rows))
    layers = [t for t in table.layers.values() if (t.dtype, t.H, t.B) in shapes]
    if layers:
        print("a whole layer, us a step; ratio above 1: the kernels are faster than PyTorch's own path")
        frame = pd.DataFrame([dataclasses.asdict(layer) for layer in layers])
        print_table(frame.assign(ratio=frame["torch_us"] / frame["triton_us"]))
    if failed:
        print_table(pd.DataFrame(failed))


def print_trials(key: Key, trials: list[Trial], every: bool) -> None:
    """What failed or was wrong; if `every`, all configs."""
    shown = [trial for trial in trials if every or trial.failed]
    if not shown:
        return
    rows = [
        {
            "config": trial.plan.describe(key.H),
            "predicted us": trial.predicted_us,
            "us/step": trial.us,
            "not measured because": trial.reason,
        }
        for trial in shown
    ]
    frame = pd.DataFrame(rows)
    print_table(frame, " ".join(map(str, row_of(key).values())))
    both = frame[["predicted us", "us/step"]].dropna()
    if len(both) > 2:
        order = both.corr(method="spearman").iloc[0, 1]
        print(f"predicted and measured order: rank correlation {order:.2f} over {len(both)} configs")


def print_plans(device: Device, shapes: list[Shape], every: bool) -> None:
    """The planned config of every shape, and if `every` all others: what they are predicted to take, or why not."""
    print(f"{device.name}: planned and predicted, not measured")
    planned = []
    for (dtype, hidden_size, batch), backward in itertools.product(shapes, (False, True)):
        itemsize = itemsize_on(device, dtype)
        problem = (itemsize, batch, hidden_size, backward)
        row = row_of(Key(backward, dtype, hidden_size, batch))
        plans = candidates(device, *problem)
        best = cost(device, *problem, plans[0])
        planned.append(row | {"config": plans[0].describe(hidden_size), "predicted": str(best)})
        if not every:
            continue
        rows = [{"config": p.describe(hidden_size), "predicted us": cost(device, *problem, p).us} for p in plans]
        for plan in dict.fromkeys(space(*problem)):
            reason = why_not(device, itemsize, hidden_size, backward, plan)
            if reason:
                rows.append({"config": plan.describe(hidden_size), "dropped because": reason})
        print_table(pd.DataFrame(rows), " ".join(map(str, row.values())))
    print_table(pd.DataFrame(planned))
