"""How a layer is cut into programs. Plain Python, no GPU in it: every decision can be made and tested on a laptop."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

Exchange = Literal["none", "flag", "barrier"]


@dataclasses.dataclass(frozen=True)
class Device:
    """What a plan needs to know of a device."""

    backend: Literal["cuda", "hip", "interpreter"]
    processors: int  # streaming multiprocessors or compute units
    shared_bytes: int  # on-chip memory one program may use


INTERPRETER = Device("interpreter", processors=1, shared_bytes=1 << 40)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One layer and direction of time: a grid of (units / block_h, groups) programs.

    exchange: how programs of one batch tile see each other's rows ("none": there is one program).
    one_launch: all steps in one launch; else a launch per step, which needs no program to wait for another.
    resident: the weights stay on chip for the whole time loop; else they are loaded in every step.
    block_b, block_h, block_k: rows, hidden units and chunk of the sum that a program works on.
    slices: the sum of a chunk is cut into so many parts, one per warp, added at the end (1: not cut).
    groups: batch tiles that run side by side; each group takes every groups-th tile in turn.
    warps: of one program.
    """

    exchange: Exchange
    one_launch: bool
    resident: bool
    block_b: int
    block_h: int
    block_k: int
    slices: int
    groups: int
    warps: int

    def grid(self, hidden_size: int) -> tuple[int, int]:
        return (_ceil_div(hidden_size, self.block_h), self.groups)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())


def shared_bytes(itemsize: int, hidden_size: int, backward: bool, plan: Plan) -> int:
    """Upper estimate of the on-chip memory of one program: weights, one chunk of rows, and room to change layouts.

    One program alone has the gradients of all four gates for rows, each of them a chunk.
    """
    alone = plan.exchange == "none"
    width = 4 * hidden_size if backward and not alone else hidden_size
    columns = plan.block_h if backward and not alone else 4 * plan.block_h
    sum_length = _ceil_div(width, plan.block_k) * plan.block_k if plan.resident else plan.block_k
    rows = plan.block_b * plan.block_k * (4 if backward and alone else 1)
    product = plan.block_b * (plan.block_h if backward else columns) * plan.slices * 4
    gates = plan.block_b * 4 * plan.block_h * itemsize
    return (sum_length * columns + rows) * itemsize + max(product, gates)


@functools.lru_cache(maxsize=4096)
def make_plan(device: Device, itemsize: int, batch: int, hidden_size: int, backward: bool) -> Plan:
    """The plan for a layer of `hidden_size` units and `batch` rows.

    itemsize: bytes an element takes on chip: the dtype's, but 8 for float32 in "tf32x3", which makes two of each.

    One program per batch tile if it can hold all weights. Else the cheapest, by `_cost`, of several programs that wait
    for each other, or of a launch per step where they are more than the device holds at once.
    """
    if device.backend == "interpreter":
        return _interpreted(batch, hidden_size)
    single = _single_program(device, itemsize, batch, hidden_size, backward)
    if single is not None:
        return single
    plans = [
        _several_programs(device, itemsize, batch, hidden_size, backward, block_b, block_h)
        for block_h in (8, 16, 32, 64)
        for block_b in (16, 32)
        if block_b * block_h <= 1024 and (block_b == 16 or itemsize < 8)  # larger tiles spill registers
    ]
    fitting = [p for p in plans if shared_bytes(itemsize, hidden_size, backward, p) <= device.shared_bytes]
    return min(fitting, key=lambda plan: _cost(itemsize, batch, hidden_size, backward, plan))


def _interpreted(batch: int, hidden_size: int) -> Plan:
    """Programs run one after another there: as few as Triton's limit of 2**20 elements a tile allows."""
    block_b, block_h = min(256, _power_of_2(batch, least=1)), _power_of_2(hidden_size, least=1)
    if block_h <= 512:
        return Plan("none", True, True, block_b, block_h, block_h, 1, 1, 1)
    return Plan("flag", False, True, block_b, 256, 1024, 1, 1, 1)


def _single_program(device: Device, itemsize: int, batch: int, hidden_size: int, backward: bool) -> Plan | None:
    block_h = _power_of_2(hidden_size)
    if 4 * block_h * block_h * itemsize > 128 * 1024:  # more weights than that spill registers
        return None
    groups = min(_ceil_div(batch, 16), device.processors)
    plan = Plan("none", True, True, 16, block_h, block_h, 1, groups, 4 if block_h <= 32 else 8)
    return plan if shared_bytes(itemsize, hidden_size, backward, plan) <= device.shared_bytes else None


def _several_programs(
    device: Device, itemsize: int, batch: int, hidden_size: int, backward: bool, block_b: int, block_h: int
) -> Plan:
    exchange: Exchange = "flag" if device.backend == "cuda" else "barrier"
    programs, tiles = _ceil_div(hidden_size, block_h), _ceil_div(batch, block_b)
    one_launch = programs <= device.processors
    groups = min(tiles, device.processors // programs) if one_launch else tiles
    width = 4 * hidden_size if backward else hidden_size
    # Longer chunks of a row, or of a tile twice as high, spill registers
    chunk_bytes = 512 if not backward or block_b > 16 else 1024
    block_k = min(_power_of_2(width), chunk_bytes // itemsize)
    slices = min(8, block_k // 16) if backward else 1
    warps = 8 if backward or itemsize == 8 else 4
    plan = Plan(exchange, one_launch, True, block_b, block_h, block_k, slices, groups, warps)
    fits = shared_bytes(itemsize, hidden_size, backward, plan) <= device.shared_bytes
    if one_launch and fits and not (backward and block_b * block_h > 512):  # a larger sum, cut in slices, spills
        return plan
    return streamed(plan, itemsize)


def streamed(plan: Plan, itemsize: int) -> Plan:
    """`plan` with its weights loaded in every step, in short chunks."""
    return dataclasses.replace(plan, resident=False, block_k=min(plan.block_k, 256 // itemsize), slices=1)


def _cost(itemsize: int, batch: int, hidden_size: int, backward: bool, plan: Plan) -> float:
    """Expected time of a step in us: not measured yet, only good for ordering plans."""
    width = 4 * hidden_size if backward else hidden_size
    rounds = _ceil_div(_ceil_div(batch, plan.block_b), max(1, plan.groups))
    rows = plan.block_b * width * itemsize / 100_000  # a program's port into L2: about 100 bytes a ns
    weights = 0 if plan.resident else 4 * plan.block_h * hidden_size * itemsize / 40_000
    launch = 0 if plan.one_launch else 50
    return launch + rounds * (1.0 + rows + weights) + 0.01 * plan.block_h
