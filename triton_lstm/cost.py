"""What a step of the time loop is expected to take. Reasoned, not measured yet: good for ordering plans.

The numbers are those of an A100 or H100 by their white papers and public micro-benchmarks, and are taken for every GPU.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from triton_lstm.devices import Device

if TYPE_CHECKING:
    from triton_lstm.plan import Plan

EXCHANGE_US = {"none": 0.0, "flag": 0.7, "barrier": 2.0}  # one trip through L2; a barrier makes about three
LAUNCH_US = 25.0  # of a launch per step, from Python
CYCLES_PER_US = 1700.0
L2_BYTES_PER_CYCLE = 64.0  # one processor's port
STREAM_BYTES_PER_CYCLE = 24.0  # the same with all processors reading weights at once
SLOWER_THAN_L2 = 3.0  # device memory
SHARED_BYTES_PER_CYCLE = 128.0
MMA_LATENCY, MMA_ISSUE = 33.0, 8.0  # cycles of an m16n8 product: until the next one of a chain, and on its own
WGMMA_LATENCY, WGMMA_ISSUE = 60.0, 1.0  # the same on Hopper's asynchronous tensor cores
CELL_CYCLES = 1.1  # an element's gates: 10 special functions on 16 lanes, and about 60 instructions on 128
STEP_CYCLES = 170.0  # what a step has besides: barriers between warps, the product's change of layout
SLICES_CYCLES = 170.0  # adding up the slices through shared memory


@dataclasses.dataclass(frozen=True)
class Cost:
    """Expected us of one batch tile's step, by part, and how the tiles share the device.

    exchange: until the others' rows are there. rows: reading them. weights: reading W_hh, where it is not resident.
    product: the recurrent product. cell: the gates. launch: where every step is a launch of its own.
    sharing: programs on one processor, which compute in turn and wait together. rounds: tiles one after another.
    """

    exchange: float
    rows: float
    weights: float
    product: float
    cell: float
    launch: float
    sharing: int
    rounds: int

    @property
    def us(self) -> float:
        """A step of the whole batch."""
        busy = self.rows + self.weights + self.product + self.cell
        return self.launch + self.rounds * max(self.exchange + busy, self.sharing * busy)

    def __str__(self) -> str:
        names = ("exchange", "rows", "weights", "product", "cell", "launch")
        parts = " + ".join(f"{name} {value:.2f}" for name in names if (value := getattr(self, name)))
        rounds = f"{self.rounds} rounds of " if self.rounds > 1 else ""
        shared = f", {self.sharing} programs sharing a processor" if self.sharing > 1 else ""
        return f"{self.us:.2f} us a step ({rounds}{parts}{shared})"


def cost(
    device: Device, itemsize: int, batch: int, hidden_size: int, backward: bool, plan: Plan, beside: int = 1
) -> Cost:
    """The expected cost of `plan`, with `beside` directions of time running at once; arguments as make_plan's."""
    tiles = -(-batch // plan.block_b)
    programs = plan.grid(hidden_size)[0] * plan.groups * beside
    stored = min(itemsize, 4)  # bytes of an element in memory; "tf32x3" makes two of it on chip
    width = plan.sum_length(hidden_size, backward)
    weight_bytes = 4 * plan.block_h * hidden_size
    rows = weights = 0.0
    if plan.exchange != "none":
        rows = plan.block_b * width * stored / L2_BYTES_PER_CYCLE
    if not plan.resident:
        beyond_l2 = 4 * hidden_size**2 * stored > device.l2_bytes
        weights = weight_bytes * stored / STREAM_BYTES_PER_CYCLE * (SLOWER_THAN_L2 if beyond_l2 else 1)
    cycles = {
        "rows": rows,
        "weights": weights,
        "product": _product_cycles(device, itemsize, hidden_size, backward, plan),
        "cell": STEP_CYCLES + CELL_CYCLES * plan.block_b * plan.block_h,
    }
    return Cost(
        exchange=EXCHANGE_US[plan.exchange],
        launch=0.0 if plan.one_launch else LAUNCH_US,
        sharing=-(-programs // device.processors),
        rounds=-(-tiles // plan.groups),
        **{name: value / CYCLES_PER_US for name, value in cycles.items()},
    )


def _product_cycles(device: Device, itemsize: int, hidden_size: int, backward: bool, plan: Plan) -> float:
    """A warp's chain of tensor-core products, or reading both operands from shared memory, whichever takes longer."""
    columns = plan.block_h * (1 if backward else 4)
    width = plan.sum_length(hidden_size, backward)
    chains = plan.block_b * columns / (16 * 8)  # sums that do not wait for each other
    products = chains * width * min(itemsize, 4) / 32 * (3 if itemsize == 8 else 1)  # each sums over 32 bytes of a row
    if plan.uses_wgmma(device):  # all warps together, each operand read once
        tensor, readers = WGMMA_LATENCY + products * WGMMA_ISSUE, 1.0
    else:
        used = plan.warps if plan.slices > 1 else min(plan.warps, chains)
        independent = max(1.0, chains if plan.slices > 1 else chains / used)
        tensor = products / used * max(MMA_LATENCY / independent, MMA_ISSUE * max(1.0, used / 4))
        readers = 1.0 if plan.slices > 1 else used
    shared = width * itemsize * (columns + readers * plan.block_b) / SHARED_BYTES_PER_CYCLE
    return max(tensor, shared) + (SLICES_CYCLES if plan.slices > 1 else 0.0)
