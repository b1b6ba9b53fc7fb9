"""The model beside what was measured: the times of a GPU's tuned table, and of the bare exchange in its results."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from triton_lstm.perf.exchange_loop import COLUMNS, WARPS
from triton_lstm.perf.step.compiled import compile_exchange, modelled
from triton_lstm.perf.step.constants import Constants
from triton_lstm.perf.step.machine_code import disassemble
from triton_lstm.perf.step.model import model_step
from triton_lstm.perf.step.timeline import Loop
from triton_lstm.planning.devices import Device, file_name
from triton_lstm.planning.plan import EXCHANGES
from triton_lstm.planning.space import make_plan, with_groups
from triton_lstm.tuning.tables import table_for

RESULTS = Path(__file__).parents[1] / "results"


class Compared(NamedTuple):
    """us of a step; both of the whole batch."""

    name: str
    measured: float
    modelled: float


def compare(device: Device, constants: Constants) -> Iterator[Compared]:
    """All that was measured on a device, compiled again; nothing where there are no results."""
    yield from _tuned(device, constants)
    yield from _exchanges(device, constants)


def _tuned(device: Device, constants: Constants) -> Iterator[Compared]:
    """The best config of every time loop, and the planned one."""
    for key, tuned in table_for(device.name).plans.items():
        problem = key.on(device)
        plans = {make_plan(problem): tuned.planned_us, with_groups(problem, tuned.plan): tuned.us}
        for plan, us in plans.items():
            if us is not None:
                (step,) = modelled(problem, plan, constants)
                direction = "backward" if key.backward else "forward"
                name = f"{key.dtype} H={key.H} B={key.B} {direction} {plan}"
                yield Compared(name, us, step.us(step.waiting))


def _exchanges(device: Device, constants: Constants) -> Iterator[Compared]:
    for path in sorted((RESULTS / Path(file_name(device.name)).stem).glob("bench_*.csv")):
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["case"].startswith("exchange-") and row["us_per_step"]]
        for row in rows:
            _, kind, text = row["case"].split("-")
            exchange, programs = next(e for e in EXCHANGES if e == kind), int(text)
            code = disassemble(compile_exchange(device, programs, exchange).asm["cubin"])[2]
            chunks = max(1, programs * COLUMNS // 1024)
            loop = Loop(WARPS, programs, chunks=chunks)
            step = model_step(code, loop, constants)
            yield Compared(row["case"], float(row["us_per_step"]), step.us(step.waiting))
