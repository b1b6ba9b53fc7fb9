"""Every way to divide a time loop among programs, and the best one. Plain Python: planning needs no GPU."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

from triton_lstm.planning.cost import cost
from triton_lstm.planning.limits import co_resident, directions_at_once, why_impossible, why_not
from triton_lstm.planning.plan import EXCHANGES, Plan
from triton_lstm.planning.problem import Problem


def _power_of_2(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())


def space(problem: Problem) -> Iterator[Plan]:
    """Every config of a time loop, including those that the device cannot run."""
    units, width = _power_of_2(problem.H), _power_of_2(problem.row_length, least=64)
    itemsize = problem.itemsize
    chunks = sorted({min(width, max(16, size // itemsize)) for size in (128, 256, 512, 1024)}, reverse=True)
    for block_b in (n for n in (16, 32, 64) if n <= _power_of_2(problem.B)):
        for warps in (4, 8):
            yield Plan("none", True, True, block_b, units, units, 1, 1, warps)
            tiles = itertools.product(EXCHANGES, (True, False), (8, 16, 32, 64, 128), chunks, (1, warps))
            for exchange, resident, block_h, block_k, slices in tiles:
                if block_k >= 16 * slices and block_h < 2 * units:
                    plan = Plan(exchange, True, resident, block_b, block_h, block_k, slices, 1, warps)
                    yield plan
                    for splits in (2, 4, 8) if problem.backward and resident else ():
                        if block_h >= 8 * splits and block_k * splits < 2 * width:
                            yield dataclasses.replace(plan, splits=splits)


def with_groups(problem: Problem, plan: Plan) -> Plan:
    """`plan` with as many groups as are useful and, if all steps are one launch, as the device runs at once.

    With two directions of time, each leaves room for the other where that is possible.
    """
    tiles = room = max(1, -(-problem.B // plan.block_b))
    if plan.one_launch:
        room = max(1, co_resident(problem, plan) // plan.grid(problem.H)[0])
        room = max(1, room // problem.directions)
    rounds = -(-tiles // room)
    return dataclasses.replace(plan, groups=-(-tiles // rounds))


def candidates(problem: Problem) -> tuple[Plan, ...]:
    """The configs that the device can run, the cheapest by the cost model first.

    One launch per step is the fallback where no config's programs fit the device at once; configs that spill or load in
    small pieces are the fallback where nothing else can run. Two directions may each take the whole device, one after
    the other. Raises ValueError where nothing can run.
    """
    sizings = [problem._replace(directions=n) for n in range(problem.directions, 0, -1)]  # side by side, in turn
    for dropped, one_launch in itertools.product((why_not, why_impossible), (True, False)):
        plans = [dataclasses.replace(plan, one_launch=one_launch) for plan in space(problem)]
        fitting = dict.fromkeys(
            with_groups(sizing, plan) for plan in plans if dropped(problem, plan) is None for sizing in sizings
        )
        if fitting:
            return tuple(sorted(fitting, key=lambda plan: _us(problem, plan)))
    device = problem.device
    raise ValueError(
        f"a program has {device.shared_bytes} bytes of shared memory on {device.name}, too few for a kernel"
    )


def _us(problem: Problem, plan: Plan) -> float:
    """A step of all directions of time, side by side or one after the other."""
    return cost(problem, plan).us * (problem.directions // directions_at_once(problem, plan))


@functools.lru_cache(maxsize=4096)
def make_plan(problem: Problem) -> Plan:
    """The plan for a problem that has not been measured. Raises ValueError where nothing can run."""
    if problem.device.backend == "interpreter":
        return _interpreted(problem)
    return candidates(problem)[0]


def _interpreted(problem: Problem) -> Plan:
    """As few programs as Triton's limit of 2**20 elements per tile allows: the interpreter runs them one by one."""
    block_b, block_h = min(64, _power_of_2(problem.B, least=1)), _power_of_2(problem.H, least=1)
    if block_h <= 512:
        return Plan("none", True, True, block_b, block_h, block_h, 1, 1, 1)
    return Plan("flag", False, True, block_b, 256, 1024, 1, 1, 1)


def streamed(plan: Plan, itemsize: int) -> Plan:
    """`plan` with its weights loaded in every step, in short chunks. itemsize: bytes of an element in memory."""
    return dataclasses.replace(plan, resident=False, block_k=min(plan.block_k, 256 // itemsize), slices=1)
