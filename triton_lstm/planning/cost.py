"""The cost model: how long a step of the time loop should take, to order plans by.

Its constants are fitted to 143 time loops measured on one H200 (perf/results/nvidia_h200/time_loops.csv; bf16 and tf32,
H 128 to 1024, B 16 to 256, forward and backward) and are used for every GPU. With each of their 18 problems held out of
the fit in turn, what it chooses takes 3% more than the best in the mean and 11% at most; Spearman 0.72. What was not
measured is reasoned: a program that is alone, sums that programs split, streamed weights, float32, and launches step by
step.
"""

from __future__ import annotations

import dataclasses

from triton_lstm.planning.devices import KIB
from triton_lstm.planning.limits import directions_at_once
from triton_lstm.planning.plan import Plan
from triton_lstm.planning.problem import Problem

STEP_US = 1.11  # a trip through L2 and the latencies of a step with four warps
ALONE_US = 0.65  # the same without the trip
WARP_US = 0.082  # for each warp above four
BARRIER_US = 0.137  # of a counter
FLAG_US = 0.0116  # instead of it, for each program of a batch tile: all look at the same lines of L2
ROWS_US = 0.0011  # for each KiB of rows that a program reads
L2_US = 0.0865  # for each MiB that programs read at a time
PARTS_US = 1.5  # of the exchange of parts, without the words; more than modelled, as nothing of it has been measured
WORD_BYTES = 8  # of a part: a float32 and its step
PRODUCT_US = {True: 0.0144, False: 0.0105}  # for each m16n8 product over 32 bytes in a warp; with slices, without
WEIGHTS_US = 0.0023  # for each KiB of weights in shared memory, and every 16 rows
SCATTERED_US = 0.043  # for each KiB of them that is read element by element
CELL_US = 0.05  # for each unit and row in a thread
LAUNCH_US = 25.0  # where every step is launched from Python
STREAM_US = 0.024  # for each KiB of weights that a program reads in every step while all others do
SLOWER_THAN_L2 = 3.0  # device memory
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Cost:
    """Expected us per step of one batch tile, by part, and how the tiles share the device.

    exchange: latencies of a step, waiting for the other programs' rows among them. rows: reading them. parts: sending
    and reading parts of sums, where programs split them. weights: reading W_hh, where it is not resident. product: the
    recurrent product. cell: the gates. launch: where every step is launched separately. sharing: programs per
    processor, which compute in turn and wait together. rounds: tiles processed in sequence.
    """

    exchange: float
    rows: float
    parts: float
    weights: float
    product: float
    cell: float
    launch: float
    sharing: int
    rounds: int

    @property
    def us(self) -> float:
        """Of a step of the whole batch."""
        busy = self.rows + self.parts + self.weights + self.product + self.cell
        return self.launch + self.rounds * max(self.exchange + busy, self.sharing * busy)

    def __str__(self) -> str:
        names = ("exchange", "rows", "parts", "weights", "product", "cell", "launch")
        parts = " + ".join(f"{name} {value:.2f}" for name in names if (value := getattr(self, name)))
        rounds = f"{self.rounds} rounds of " if self.rounds > 1 else ""
        shared = f", {self.sharing} programs sharing a processor" if self.sharing > 1 else ""
        return f"{self.us:.2f} us a step ({rounds}{parts}{shared})"


def cost(problem: Problem, plan: Plan) -> Cost:
    """The expected cost of one direction of time, while as many run as `directions_at_once` says."""
    device, hidden_size, stored = problem.device, problem.H, problem.stored_itemsize
    tiles = -(-problem.B // plan.block_b)
    of_a_tile = plan.grid(hidden_size)[0]
    programs = of_a_tile * plan.groups * directions_at_once(problem, plan)
    sharing = -(-programs // device.processors)
    rows = parts = weights = 0.0
    exchange = ALONE_US if plan.exchange == "none" else STEP_US
    exchange += WARP_US * (plan.warps - 4)
    if plan.exchange != "none":
        read = plan.block_b * plan.sum_length(problem) * stored
        exchange += FLAG_US * of_a_tile if plan.exchange == "flag" else BARRIER_US
        rows = _reading_us(read, programs // sharing)
    if plan.splits > 1:  # each word is written and read
        parts = PARTS_US + _reading_us(2 * WORD_BYTES * plan.block_b * plan.block_h, programs // sharing)
    if not plan.resident:
        beyond_l2 = 4 * hidden_size**2 * stored > device.l2_bytes
        weights = STREAM_US * 4 * plan.block_h * hidden_size * stored / KIB * (SLOWER_THAN_L2 if beyond_l2 else 1)
    return Cost(
        exchange=exchange,
        rows=rows,
        parts=parts,
        weights=weights,
        product=_product_us(problem, plan),
        cell=CELL_US * plan.block_b * plan.block_h / plan.splits / (32 * plan.warps),
        launch=0.0 if plan.one_launch else LAUNCH_US,
        sharing=sharing,
        rounds=-(-tiles // plan.groups),
    )


def _reading_us(read: int, programs: int) -> float:
    """Each of so many programs reads so many bytes through L2 at the same time."""
    return ROWS_US * read / KIB + L2_US * read * programs / MIB


def _product_us(problem: Problem, plan: Plan) -> float:
    """A warp's share of the products, and its operands' way through shared memory."""
    columns, terms = plan.block_h * problem.columns_per_unit, plan.sum_length(problem)
    chains = plan.block_b * columns / (16 * 8)  # independent sums
    products = chains * terms * problem.stored_itemsize / 32  # each sums over 32 bytes of a row
    products *= 3 if problem.itemsize == 8 else 1  # "tf32x3"
    used = plan.warps if plan.slices > 1 else min(plan.warps, chains)
    us = PRODUCT_US[plan.slices > 1] * products / used
    kib = terms * columns * problem.itemsize / KIB
    if plan.slices == 1:
        us += WEIGHTS_US * kib * plan.block_b / 16
    elif problem.backward:  # forward they are in registers
        us += (SCATTERED_US if plan.block_h == 8 else WEIGHTS_US) * kib
    return us
