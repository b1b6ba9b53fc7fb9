"""A plan: how a time loop is divided among programs. Data only."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from triton_lstm.planning.devices import Device
from triton_lstm.planning.problem import Problem

Exchange = Literal["none", "flag", "barrier"]
EXCHANGES: tuple[Exchange, ...] = ("flag", "barrier")  # between several programs


@dataclasses.dataclass(frozen=True)
class Tile:
    """The part of a plan that a kernel is compiled for, less the exchange: a constexpr of the kernels; see Plan."""

    RESIDENT: bool
    BLOCK_B: int
    BLOCK_H: int
    BLOCK_K: int
    SLICES: int
    SPLITS: int
    WARPS: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """One layer and direction of time: a grid of (units / block_h * splits, groups) programs.

    exchange: how programs of a batch tile see each other's rows ("none": there is a single program).
    one_launch: all steps run in one launch; otherwise one launch per step, so that no program waits for another.
    resident: the weights stay on chip for the whole time loop; otherwise every step loads them.
    block_b, block_h, block_k: rows, hidden units and chunk of the sum that a program works on.
    slices: into how many parts the sum over a chunk is split, one per warp, added up at the end (1: not split).
    groups: batch tiles that run side by side; each group processes every groups-th tile in turn.
    warps: per program.
    splits: backward, into how many parts programs divide the sum among themselves; a block_h has one program for each,
        which owns as large a part of its units (1: no program needs another one's sums).
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
    splits: int = 1

    @functools.cached_property
    def tile(self) -> Tile:
        return Tile(self.resident, self.block_b, self.block_h, self.block_k, self.slices, self.splits, self.warps)

    def grid(self, hidden_size: int) -> tuple[int, int]:
        return (-(-hidden_size // self.block_h) * self.splits, self.groups)

    @property
    def on_one_axis(self) -> Plan:
        """Without splits, as many units and weights a program."""
        return dataclasses.replace(self, block_h=self.block_h // self.splits, splits=1)

    def __str__(self) -> str:
        """flag 16x8/256:4 w4: rows x units / chunk : slices, warps; with split 2, of as many programs' units."""
        notes = "" if self.resident else " streamed"
        notes += "" if self.one_launch else " step by step"
        groups = f" x{self.groups}" if self.groups > 1 else ""
        splits = f" split {self.splits}" if self.splits > 1 else ""
        tile = f"{self.block_b}x{self.block_h}/{self.block_k}:{self.slices}"
        return f"{self.exchange} {tile} w{self.warps}{splits}{groups}{notes}"

    def describe(self, hidden_size: int) -> str:
        """The plan in one line of prose."""
        programs, groups = self.grid(hidden_size)
        held = "W_hh on chip" if self.resident else "W_hh read in every step"
        exchange = "no exchange" if self.exchange == "none" else f"{self.exchange} exchange"
        steps = "" if self.one_launch else ", a launch per step"
        splits = f"sums split among {self.splits}, " if self.splits > 1 else ""
        units = self.block_h // self.splits
        return (
            f"{exchange}, {programs} x {groups} programs of {units} units x {self.block_b} rows, {splits}"
            f"{self.warps} warps, chunks of {self.block_k} in {self.slices}, {held}{steps}"
        )

    def sum_length(self, problem: Problem) -> int:
        """Terms of the recurrent product's sum, padded to whole chunks."""
        if self.exchange == "none":  # the gates' gradients are kept apart there, one chunk each
            return self.block_k * (4 if problem.backward else 1)
        return -(-(problem.row_length // self.splits) // self.block_k) * self.block_k

    def uses_wgmma(self, device: Device) -> bool:
        """Whether the product runs on Hopper's asynchronous tensor cores, which need 64 rows and no slices."""
        return device.arch == "sm_90" and self.block_b >= 64 and self.slices == 1
