"""The cost model: how long a step of the time loop should take, to order plans by.

Its constants are fitted to time loops measured on one H200 (perf/results/nvidia_h200/time_loops.csv) and to modelled
ones of four GPUs (perf/results/modelled_loops.csv); perf/README.md says how well it orders them. All GPUs have the same
constants. Neither measured nor modelled are launches step by step and weights that do not fit L2.
"""

from __future__ import annotations

import dataclasses

from triton_lstm.planning.devices import KIB
from triton_lstm.planning.limits import chunks_in_flight, directions_at_once
from triton_lstm.planning.plan import Plan
from triton_lstm.planning.problem import Problem

MIB = 1 << 20
WORD_BYTES = 8  # of a part of a sum: a float32 and its step
LAUNCH_US = 25.0  # where every step is launched from Python
SLOWER_THAN_L2 = 3.0  # device memory


@dataclasses.dataclass(frozen=True)
class Constants:
    """us, where nothing else is said."""

    step: float = 0.682  # a trip through L2 and the latencies of a step with four warps
    alone: float = 0.00016  # of a program that is alone; its product and cell account for nearly all
    alone_backward: float = 0.556
    warp: float = 0.0546  # for each warp above four
    poll: float = 0.0019  # for each program of a batch tile, times its warps over four: all look at one counter
    release: float = 0.322  # until what is stored is released, by the barrier
    look: float = 0.0362  # instead of that, for each KiB of rows that a warp looks at
    port: float = 0.0103  # for each KiB that programs on a processor read
    l2: float = 0.0379  # for each MiB that all read at a time
    parts: float = 1.04  # of the exchange of parts, without the words
    mma: float = 0.0189  # without slices, for every 32 bytes of a row
    mma_tile: float = 0.00455  # for each of a warp's m16n8 products with them, as often as four warps share a scheduler
    chunk: float = 0.0193  # without slices, for each chunk of rows that is waited for before the next one is loaded
    streamed_chunk: float = 0.0619  # likewise, for each chunk of rows and streamed weights
    wgmma: float = 0.0224  # as mma, on Hopper's asynchronous tensor cores
    wgmma_tile: float = 0.00129  # for each 8 columns
    sliced: float = 0.00726  # with slices, for each m16n8 product over 32 bytes in a warp
    shuffled: float = 0.131  # for each chunk of rows that is no whole fragments of the tensor cores
    scattered: float = 0.0857  # for each 1024 weights that are read one by one from shared memory
    stream: float = 0.0069  # for each KiB of streamed weights, without reading it
    stream_sliced: float = 7.67e-06  # the same with slices
    stream_sliced_backward: float = 0.0105
    cell: float = 0.196  # for each unit and row in a thread
    cell_backward: float = 0.142
    exact: float = 0.0665  # more, where the elements have 32 bits
    exclusive: float = 0.507  # of a program's work, how much no other program on its processor can do at the same time


FITTED = Constants()


@dataclasses.dataclass(frozen=True)
class Cost:
    """Expected us per step of one batch tile, by part, and how the tiles share the device.

    exchange: latencies of a step, waiting for the other programs' rows and sums among them. rows: reading them. parts:
    writing and reading parts of sums, where programs split them. weights: reading W_hh, where it is not resident.
    product: the recurrent product. cell: the gates. launch: where every step is launched separately.

    sharing: programs per processor, which wait together and read one after the other. exclusive: of a program's product
    and cell, the share that no other one can do at the same time. rounds: tiles processed in sequence.
    """

    exchange: float
    rows: float
    parts: float
    weights: float
    product: float
    cell: float
    launch: float
    sharing: int
    exclusive: float
    rounds: int

    @property
    def us(self) -> float:
        """Of a step of the whole batch."""
        busy = self.product + self.cell
        read = self.sharing * (self.rows + self.parts + self.weights)
        return self.launch + self.rounds * (read + max(self.exchange + busy, self.exclusive * self.sharing * busy))

    def __str__(self) -> str:
        names = ("exchange", "rows", "parts", "weights", "product", "cell", "launch")
        parts = " + ".join(f"{name} {value:.2f}" for name in names if (value := getattr(self, name)))
        rounds = f"{self.rounds} rounds of " if self.rounds > 1 else ""
        shared = f", {self.sharing} programs sharing a processor" if self.sharing > 1 else ""
        return f"{self.us:.2f} us a step ({rounds}{parts}{shared})"


def cost(problem: Problem, plan: Plan, constants: Constants = FITTED) -> Cost:
    """The expected cost of one direction of time, while as many run as `directions_at_once` says."""
    device, stored, k = problem.device, problem.stored_itemsize, constants
    programs, groups = plan.grid(problem.H)
    every = programs * groups * directions_at_once(problem, plan)
    sharing = -(-every // device.processors)
    at_a_time = every // sharing
    rows = parts = weights = 0.0
    exchange = k.alone_backward if problem.backward else k.alone
    if plan.exchange != "none":
        exchange = k.step
        read = plan.block_b * plan.sum_length(problem) * stored
        exchange += k.warp * (plan.warps - 4)
        exchange += k.poll * programs * plan.warps / 4
        exchange += k.release if plan.exchange == "barrier" else k.look * read / KIB / plan.warps
        rows = _reading_us(read, at_a_time, k)
    if plan.splits > 1:  # each word is written and read
        exchange += k.parts
        parts = _reading_us(2 * WORD_BYTES * plan.block_b * plan.block_h, at_a_time, k)
    if not plan.resident:
        read = 4 * plan.block_h * problem.H * stored
        weights = _reading_us(read, at_a_time, k) * (SLOWER_THAN_L2 if beyond_l2(problem) else 1.0)
    cell = (k.cell_backward if problem.backward else k.cell) + (k.exact if stored == 4 else 0.0)
    return Cost(
        exchange=exchange,
        rows=rows,
        parts=parts,
        weights=weights,
        product=_product_us(problem, plan, k),
        cell=cell * plan.block_b * plan.block_h / plan.splits / (32 * plan.warps),
        launch=0.0 if plan.one_launch else LAUNCH_US,
        sharing=sharing,
        exclusive=k.exclusive,
        rounds=-(-problem.B // (plan.block_b * groups)),
    )


def beyond_l2(problem: Problem) -> bool:
    """Whether weights that are read in every step come from device memory."""
    return 4 * problem.H**2 * problem.stored_itemsize > problem.device.l2_bytes


def _reading_us(read: int, programs: int, k: Constants) -> float:
    """Each of so many programs reads so many bytes through L2 at the same time."""
    return k.port * read / KIB + k.l2 * read * programs / MIB


def _product_us(problem: Problem, plan: Plan, k: Constants) -> float:
    """The products of a warp, and their operands' way to the tensor cores."""
    columns, terms = plan.block_h * problem.columns_per_unit, plan.sum_length(problem)
    tiles = plan.block_b * columns / (16 * 8)
    pieces = terms * problem.stored_itemsize / 32 * (3 if problem.itemsize == 8 else 1)  # "tf32x3"
    chunks = terms / plan.block_k
    us = 0.0
    if not plan.resident:
        kib = terms * columns * problem.stored_itemsize / KIB
        sliced = k.stream_sliced_backward if problem.backward else k.stream_sliced
        us = k.streamed_chunk * chunks + (sliced if plan.slices > 1 else k.stream) * kib
    elif plan.slices == 1:
        us = k.chunk * chunks / chunks_in_flight(problem, plan)
    if plan.slices > 1:
        if problem.backward and plan.block_h == 8:
            us += k.scattered * terms * columns / 1024
        if plan.block_k * problem.stored_itemsize < 64 * plan.slices:  # see `fills_fragments`
            us += k.shuffled * chunks
        return us + k.sliced * pieces * tiles / plan.slices
    if plan.uses_wgmma(problem.device):
        return us + pieces * (k.wgmma + k.wgmma_tile * columns / 8)
    return us + pieces * (k.mma + k.mma_tile * max(1.0, tiles / plan.warps) * plan.warps / 4)
