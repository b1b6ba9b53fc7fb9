"""Which plan a call takes: the measured one of a tuned table, its nearest neighbour's, or the planned one."""

from __future__ import annotations

import dataclasses
import functools
import math

from triton_lstm.planning.limits import directions_at_once, why_not
from triton_lstm.planning.plan import Plan
from triton_lstm.planning.problem import Problem
from triton_lstm.planning.space import make_plan, with_groups
from triton_lstm.tuning.table_file import Key, LayerTime, Tuned, bucket
from triton_lstm.tuning.tables import table_for

NEAR = 1.0  # how far away, in doublings of H and B combined, a neighbour may be


@dataclasses.dataclass(frozen=True)
class Choice:
    """A plan and the measurement it comes from, perhaps a neighbour's; None where nothing near was measured."""

    plan: Plan
    tuned: Tuned | None

    def exactly(self, problem: Problem) -> bool:
        """Whether the problem's own key was measured, not a neighbour's."""
        return self.tuned is not None and self.tuned.key == Key.of(problem)


def layer_time(gpu: str, mode: str, dtype: str, hidden_size: int, batch: int) -> LayerTime | None:
    """The measured times of a layer of this size and of `batch`'s bucket; None where they have not been measured."""
    return table_for(gpu).layers.get((mode, dtype, hidden_size, bucket(batch)))


def remember(gpu: str, *found: Tuned) -> None:
    """Adds measurements to what this process knows."""
    table = table_for(gpu)
    table.plans = table.plans | {entry.key: entry for entry in found}  # another thread may be reading the old one
    choose.cache_clear()


def forget() -> None:
    """Makes the next call that needs a plan read the tables again."""
    table_for.cache_clear()
    choose.cache_clear()


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem) -> Choice:
    """The plan for a time loop, from the nearest entry of the GPU's table or, where none is near, from `make_plan`.

    A neighbour has the same direction and dtype, and differs by at most a factor of two in H and B combined. Entries
    that the device cannot run are skipped; so are, for two directions of time, those that cannot run both at once.
    """
    device, wanted = problem.device, Key.of(problem)
    entries = table_for(device.name).plans.values() if device.backend != "interpreter" else ()

    def distance(entry: Tuned) -> float:
        return abs(math.log2(entry.key.H / wanted.H)) + abs(math.log2(entry.key.B / wanted.B))

    alike = [e for e in entries if (e.key.backward, e.key.dtype) == (wanted.backward, wanted.dtype)]
    for entry in sorted((e for e in alike if distance(e) <= NEAR), key=distance):
        if why_not(problem, entry.plan) is not None:
            continue
        plan = with_groups(problem, entry.plan)
        if directions_at_once(problem, plan) == problem.directions:
            return Choice(plan, entry)
    return Choice(make_plan(problem), None)
