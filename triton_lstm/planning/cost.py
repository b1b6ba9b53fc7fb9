"""The cost model: how long a step of the time loop should take. Reasoned, not measured yet: good for ordering plans.

The constants are those of an A100 or H100, from white papers and public micro-benchmarks, and are used for every GPU.
"""

from __future__ import annotations

import dataclasses

from triton_lstm.planning.limits import directions_at_once
from triton_lstm.planning.plan import Plan
from triton_lstm.planning.problem import Problem

EXCHANGE_US = {"none": 0.0, "flag": 0.7, "barrier": 2.0}  # one round trip through L2; a barrier takes about three
LAUNCH_US = 25.0  # where every step is launched from Python
CYCLES_PER_US = 1700.0
L2_BYTES_PER_CYCLE = 64.0  # through one processor's port
STREAM_BYTES_PER_CYCLE = 24.0  # the same while all processors read weights
SLOWER_THAN_L2 = 3.0  # device memory
SHARED_BYTES_PER_CYCLE = 128.0
MMA_LATENCY, MMA_ISSUE = 33.0, 8.0  # cycles of an m16n8 product: in a dependent chain, and independent
WGMMA_LATENCY, WGMMA_ISSUE = 60.0, 1.0  # the same on Hopper's asynchronous tensor cores
CELL_CYCLES = 1.1  # per element, its gates: 10 special functions on 16 lanes, about 60 instructions on 128
STEP_CYCLES = 170.0  # the rest of a step: barriers between warps, the product's layout conversion
SLICES_CYCLES = 170.0  # adding up the slices through shared memory


@dataclasses.dataclass(frozen=True)
class Cost:
    """Expected us per step of one batch tile, by part, and how the tiles share the device.

    exchange: waiting for the other programs' rows. rows: reading them. weights: reading W_hh, where it is not resident.
    product: the recurrent product. cell: the gates. launch: where every step is launched separately.
    sharing: programs per processor, which compute in turn and wait together. rounds: tiles processed in sequence.
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
        """Of a step of the whole batch."""
        busy = self.rows + self.weights + self.product + self.cell
        return self.launch + self.rounds * max(self.exchange + busy, self.sharing * busy)

    def __str__(self) -> str:
        names = ("exchange", "rows", "weights", "product", "cell", "launch")
        parts = " + ".join(f"{name} {value:.2f}" for name in names if (value := getattr(self, name)))
        rounds = f"{self.rounds} rounds of " if self.rounds > 1 else ""
        shared = f", {self.sharing} programs sharing a processor" if self.sharing > 1 else ""
        return f"{self.us:.2f} us a step ({rounds}{parts}{shared})"


def cost(problem: Problem, plan: Plan) -> Cost:
    """The expected cost of one direction of time, while as many run as `directions_at_once` says."""
    device, hidden_size, stored = problem.device, problem.H, problem.stored_itemsize
    tiles = -(-problem.B // plan.block_b)
    programs = plan.grid(hidden_size)[0] * plan.groups * directions_at_once(problem, plan)
    width = plan.sum_length(problem)
    weight_elements = 4 * plan.block_h * hidden_size
    rows = weights = 0.0
    if plan.exchange != "none":
        rows = plan.block_b * width * stored / L2_BYTES_PER_CYCLE
    if not plan.resident:
        beyond_l2 = 4 * hidden_size**2 * stored > device.l2_bytes
        weights = weight_elements * stored / STREAM_BYTES_PER_CYCLE * (SLOWER_THAN_L2 if beyond_l2 else 1)
    cycles = {
        "rows": rows,
        "weights": weights,
        "product": _product_cycles(problem, plan),
        "cell": STEP_CYCLES + CELL_CYCLES * plan.block_b * plan.block_h,
    }
    return Cost(
        exchange=EXCHANGE_US[plan.exchange],
        launch=0.0 if plan.one_launch else LAUNCH_US,
        sharing=-(-programs // device.processors),
        rounds=-(-tiles // plan.groups),
        **{name: value / CYCLES_PER_US for name, value in cycles.items()},
    )


def _product_cycles(problem: Problem, plan: Plan) -> float:
    """A warp's chain of tensor-core products or reading both operands from shared memory, whichever takes longer."""
    itemsize, width = problem.itemsize, plan.sum_length(problem)
    columns = plan.block_h * problem.columns_per_unit
    chains = plan.block_b * columns / (16 * 8)  # independent sums
    products = chains * width * problem.stored_itemsize / 32  # each sums over 32 bytes of a row
    products *= 3 if itemsize == 8 else 1  # "tf32x3"
    if plan.uses_wgmma(problem.device):  # all warps together, each operand read once
        tensor, readers = WGMMA_LATENCY + products * WGMMA_ISSUE, 1.0
    else:
        used = plan.warps if plan.slices > 1 else min(plan.warps, chains)
        independent = max(1.0, chains if plan.slices > 1 else chains / used)
        tensor = products / used * max(MMA_LATENCY / independent, MMA_ISSUE * max(1.0, used / 4))
        readers = 1.0 if plan.slices > 1 else used
    shared = width * itemsize * (columns + readers * plan.block_b) / SHARED_BYTES_PER_CYCLE
    return max(tensor, shared) + (SLICES_CYCLES if plan.slices > 1 else 0.0)
