"""How a layer is cut into programs. Plain Python, no GPU in it: every decision can be made and tested on a laptop."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Literal

from triton_lstm.cost import cost
from triton_lstm.devices import Device
from triton_lstm.limits import co_resident, why_impossible, why_not

Exchange = Literal["none", "flag", "barrier"]
EXCHANGES: tuple[Exchange, ...] = ("flag", "barrier")  # between several programs


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

    def __str__(self) -> str:
        """flag 16x8/256:4 w4: rows x units / chunk : slices, warps."""
        notes = "" if self.resident else " streamed"
        notes += "" if self.one_launch else " step by step"
        groups = f" x{self.groups}" if self.groups > 1 else ""
        tile = f"{self.block_b}x{self.block_h}/{self.block_k}:{self.slices}"
        return f"{self.exchange} {tile} w{self.warps}{groups}{notes}"

    def describe(self, hidden_size: int) -> str:
        """In a line."""
        programs, groups = self.grid(hidden_size)
        held = "W_hh on chip" if self.resident else "W_hh read in every step"
        exchange = "no exchange" if self.exchange == "none" else f"{self.exchange} exchange"
        steps = "" if self.one_launch else ", a launch per step"
        return (
            f"{exchange}, {programs} x {groups} programs of {self.block_h} units x {self.block_b} rows, "
            f"{self.warps} warps, chunks of {self.block_k} in {self.slices}, {held}{steps}"
        )

    def sum_length(self, hidden_size: int, backward: bool) -> int:
        """Terms of the recurrent product's sum, padded to whole chunks: H forward, all gates' 4H backward."""
        if self.exchange == "none":  # which has the gates' gradients apart, each of them a chunk
            return self.block_k * (4 if backward else 1)
        return _ceil_div(4 * hidden_size if backward else hidden_size, self.block_k) * self.block_k

    def on(
        self, device: Device, itemsize: int, batch: int, hidden_size: int, backward: bool, directions: int = 1
    ) -> Plan:
        """This plan with as many groups as are useful and, if all steps are one launch, as `device` holds at once.

        directions: 2 leaves room for the other direction of time beside them, if there is any.
        """
        tiles = room = max(1, _ceil_div(batch, self.block_b))
        if self.one_launch:
            room = max(1, co_resident(device, itemsize, hidden_size, backward, self) // self.grid(hidden_size)[0])
            room = max(1, room // directions)
        rounds = _ceil_div(tiles, room)
        return dataclasses.replace(self, groups=_ceil_div(tiles, rounds))

    def beside(self, device: Device, itemsize: int, hidden_size: int, backward: bool) -> bool:
        """Whether both directions of time can run in one launch: where programs wait, all have to fit at once."""
        if self.exchange == "none" or not self.one_launch:
            return True
        programs, groups = self.grid(hidden_size)
        return 2 * programs * groups <= co_resident(device, itemsize, hidden_size, backward, self)

    def uses_wgmma(self, device: Device) -> bool:
        """Whether the product runs on Hopper's asynchronous tensor cores, which take 64 rows and no slices."""
        return device.arch == "sm_90" and self.block_b >= 64 and self.slices == 1

    def poll_bytes(self, itemsize: int, hidden_size: int, backward: bool) -> int:
        """How much of a row a thread looks at in one load: 16 bytes, or less where rows are not aligned to that.

        itemsize: in memory.
        """
        row = itemsize * (4 * hidden_size if backward else hidden_size)
        return min(16, row & -row)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())


def space(itemsize: int, batch: int, hidden_size: int, backward: bool) -> Iterator[Plan]:
    """Every config there is for a layer, those included that a device cannot run; arguments as make_plan's."""
    units, width = _power_of_2(hidden_size), _power_of_2(4 * hidden_size if backward else hidden_size, least=64)
    chunks = sorted({min(width, max(16, size // itemsize)) for size in (128, 256, 512, 1024)}, reverse=True)
    for block_b in (n for n in (16, 32, 64) if n <= _power_of_2(batch)):
        for warps in (4, 8):
            yield Plan("none", True, True, block_b, units, units, 1, 1, warps)
            tiles = itertools.product(EXCHANGES, (True, False), (8, 16, 32, 64, 128), chunks, (1, warps))
            for exchange, resident, block_h, block_k, slices in tiles:
                if block_k >= 16 * slices and block_h < 2 * units:
                    yield Plan(exchange, True, resident, block_b, block_h, block_k, slices, 1, warps)


def candidates(
    device: Device, itemsize: int, batch: int, hidden_size: int, backward: bool, directions: int = 1
) -> tuple[Plan, ...]:
    """The configs for `device`, the cheapest by the cost model first; arguments as make_plan's.

    A launch per step is left only where no config's programs fit the device at once, and what spills or loads in small
    pieces only where nothing else can run. Two directions may each take the whole device, one after the other.
    """
    problem = (itemsize, batch, hidden_size, backward)
    for dropped, one_launch in itertools.product((why_not, why_impossible), (True, False)):
        plans = [dataclasses.replace(plan, one_launch=one_launch) for plan in space(*problem)]
        fitting = dict.fromkeys(
            p.on(device, *problem, at_once)
            for p in plans
            if dropped(device, itemsize, hidden_size, backward, p) is None
            for at_once in range(directions, 0, -1)
        )
        if fitting:
            return tuple(sorted(fitting, key=lambda plan: _us(device, *problem, plan, directions)))
    raise ValueError(
        f"a program has {device.shared_bytes} bytes of shared memory on {device.name}, too few for a kernel"
    )


def _us(
    device: Device, itemsize: int, batch: int, hidden_size: int, backward: bool, plan: Plan, directions: int
) -> float:
    """A step of all directions of time: side by side, or one after the other."""
    problem = (device, itemsize, batch, hidden_size, backward, plan)
    if directions == 2 and not plan.beside(device, itemsize, hidden_size, backward):
        return 2 * cost(*problem).us
    return cost(*problem, directions).us


@functools.lru_cache(maxsize=4096)
def make_plan(device: Device, itemsize: int, batch: int, hidden_size: int, backward: bool, directions: int = 1) -> Plan:
    """The plan for a layer of `hidden_size` units and `batch` rows that nobody has measured.

    itemsize: bytes an element takes on chip: the dtype's, but 8 for float32 in "tf32x3", which makes two of each.
    backward: back-propagation through time. directions: 2 if the layer is bidirectional.
    """
    if device.backend == "interpreter":
        return _interpreted(batch, hidden_size)
    return candidates(device, itemsize, batch, hidden_size, backward, directions)[0]


def _interpreted(batch: int, hidden_size: int) -> Plan:
    """Programs run one after another there: as few as Triton's limit of 2**20 elements a tile allows."""
    block_b, block_h = min(256, _power_of_2(batch, least=1)), _power_of_2(hidden_size, least=1)
    if block_h <= 512:
        return Plan("none", True, True, block_b, block_h, block_h, 1, 1, 1)
    return Plan("flag", False, True, block_b, 256, 1024, 1, 1, 1)


def streamed(plan: Plan, itemsize: int) -> Plan:
    """`plan` with its weights loaded in every step, in short chunks."""
    return dataclasses.replace(plan, resident=False, block_k=min(plan.block_k, 256 // itemsize), slices=1)
