"""What a device can run of a plan, how much of it at once, and why it cannot run the rest."""

from __future__ import annotations

from typing import NamedTuple

from triton_lstm.planning.devices import KIB
from triton_lstm.planning.plan import Plan
from triton_lstm.planning.problem import Problem

REGISTERS = 255  # per thread; `launch` allows no more
RESERVED_BYTES = 1024  # of a processor's shared memory, for each program on it


def shared_bytes(problem: Problem, plan: Plan) -> int:
    """Estimate of the on-chip memory of one program: weights, chunks of rows, and room for layout conversions.

    An upper bound in all compiled kernels on NVIDIA; on AMD weights may stay in registers instead. A program that is
    alone has rows with the gradients of all four gates, one chunk each.
    """
    itemsize, alone = problem.itemsize, plan.exchange == "none"
    columns = plan.block_h * problem.columns_per_unit
    length = plan.sum_length(problem) if plan.resident else plan.block_k
    chunks = 4 if problem.backward else 1
    if not alone:
        chunks = chunks_in_flight(problem, plan)
    rows = plan.block_b * plan.block_k * chunks
    product = plan.block_b * columns * plan.slices * 4
    gates = plan.block_b * 4 * plan.block_h * itemsize
    return (length * columns + rows) * itemsize + max(product, gates)


def chunks_in_flight(problem: Problem, plan: Plan) -> int:
    """Chunks of rows in shared memory at once; with slices, rows do not pass through it. See `multiply`."""
    if plan.slices > 1 or not plan.resident or plan.block_b >= 64 or problem.itemsize == 8:
        return 1
    fitting = 24 * KIB // (plan.block_b * plan.block_k * problem.stored_itemsize)
    return max(1, min(fitting, plan.sum_length(problem) // plan.block_k))


def co_resident(problem: Problem, plan: Plan) -> int:
    """How many programs are sure to run at once: one per processor, more where they are known to fit."""
    device = problem.device
    if device.backend != "cuda":
        return device.processors
    needed = shared_bytes(problem, plan) + RESERVED_BYTES
    by_shared = (device.shared_bytes + RESERVED_BYTES) // needed
    by_registers = device.registers // ((REGISTERS + 1) * plan.warps * device.warp_size)
    return device.processors * max(1, min(by_shared, by_registers))


def directions_at_once(problem: Problem, plan: Plan) -> int:
    """How many directions of time one launch runs: both, unless programs wait for each other and do not all fit."""
    waits = plan.one_launch and plan.exchange != "none"
    programs, groups = plan.grid(problem.H)
    if waits and problem.directions * programs * groups > co_resident(problem, plan):
        return 1
    return problem.directions


def why_not(problem: Problem, plan: Plan) -> str | None:
    """None if the device can run the plan and should, otherwise the reason in words."""
    reason = why_impossible(problem, plan) or loads_too_little(problem, plan)
    if reason is None and (spills := _spills(problem, plan)):
        return f"it would spill registers: {spills}"
    return reason


def why_impossible(problem: Problem, plan: Plan) -> str | None:
    """The reason why a plan cannot run at all, not even slowly."""
    device = problem.device
    if plan.exchange == "flag" and device.backend == "hip":
        return "the flag exchange needs NVIDIA's PTX"
    if plan.splits > 1 and device.backend == "hip":
        return "the exchange of split sums needs volatile loads, which the compiler for AMD drops"
    if plan.exchange == "none" and plan.block_h < problem.H:
        return f"one program of {plan.block_h} units cannot hold a layer of {problem.H}"
    if plan.exchange == "none" and not (plan.resident and plan.slices == 1 and plan.block_k == plan.block_h):
        return "one program holds all weights, in one chunk"
    if plan.splits > 1 and not (problem.backward and plan.one_launch and plan.exchange != "none"):
        return "only BPTT with all steps in one launch splits its sum among programs"
    own = plan.block_b * plan.block_h // plan.splits
    if plan.splits > 1 and own < device.warp_size * plan.warps:
        return f"its {plan.warps} warps would look at copies of the words of only {own} sums, each at another time"
    if plan.splits > 1 and problem.precision == "fp64":
        return "a part of a sum is a float32"
    if plan.splits > 1 and problem.row_length * problem.stored_itemsize % (16 * plan.splits):
        return f"a row of {problem.row_length} gradients has no {plan.splits} parts of whole 16 bytes"
    chunk_bytes = plan.block_b * plan.block_k * problem.stored_itemsize
    if plan.exchange == "flag" and device.backend == "cuda" and chunk_bytes < 4 * device.warp_size * plan.warps:
        return f"a chunk of {plan.block_k} has less than a register of rows for each thread to look at"
    shared = shared_bytes(problem, plan)
    if shared > device.shared_bytes:
        return f"it needs {shared / KIB:.0f} KiB of shared memory, a program has {device.shared_bytes / KIB:.0f} KiB"
    if device.backend == "cuda" and (REGISTERS + 1) * plan.warps * device.warp_size > device.registers:
        return f"{plan.warps} warps with {REGISTERS} registers a thread are more than a processor has"
    programs, room = plan.grid(problem.H)[0], co_resident(problem, plan)
    if plan.one_launch and plan.exchange != "none" and programs > room:
        return f"its {programs} programs wait for each other, and only {room} run at once"
    return None


def loads_too_little(problem: Problem, plan: Plan) -> str | None:
    threads = problem.device.warp_size * plan.warps
    polled = plan.block_b * plan.block_k * problem.stored_itemsize // threads
    if plan.exchange != "none" and polled < problem.load_bytes:
        return f"a chunk of {plan.block_k} has less than 16 bytes for each thread to load"
    return None


class Held(NamedTuple):
    """Registers of a thread, in sums, a chunk of rows, a chunk of weights (or all that stay), and all rows; and its own
    rows times units."""

    sums: float
    rows: float
    weights: float
    all_rows: float
    units: float


# Up to here no kernel of perf/results/modelled_loops.csv spills: by product, resident weights, and direction. These are
# of bf16 and TF32 on four GPUs; other dtypes are taken to need as much by their size.
_MOST = {
    ("mma", True, False): Held(32, 256, 0, 256, 64),
    ("mma", True, True): Held(32, 64, 0, 512, 64),
    ("mma", False, False): Held(32, 128, 64, 0, 64),
    ("mma", False, True): Held(8, 512, 64, 0, 64),
    ("wgmma", True, False): Held(32, 512, 0, 96, 64),
    ("wgmma", True, True): Held(64, 128, 0, 128, 64),
    ("wgmma", False, False): Held(128, 512, 32, 0, 64),
    ("wgmma", False, True): Held(16, 256, 16, 0, 64),
    ("sliced", True, False): Held(64, 32, 128, 192, 64),
    ("sliced", True, True): Held(64, 32, 0, 2048, 8),
    ("sliced", False, False): Held(32, 64, 64, 0, 64),
    ("sliced", False, True): Held(32, 32, 64, 0, 64),
}


def held(problem: Problem, plan: Plan) -> Held:
    """By a plan with an exchange."""
    copies = 2 if problem.itemsize == 8 else 1  # of all numbers, in "tf32x3"
    if plan.slices == 1 and problem.itemsize > 2:  # the exact functions of the cell need as many again
        copies *= 2
    threads, size = 32 * plan.warps, problem.itemsize / 4
    columns, terms = plan.block_h * problem.columns_per_unit, plan.sum_length(problem)
    weights = 0.0
    if not plan.resident:
        weights = size * plan.block_k * columns / threads
    elif plan.slices > 1 and not problem.backward:  # see `load_weights`
        weights = size * terms * columns / threads
    return Held(
        sums=copies * plan.block_b * columns * plan.slices / threads,
        rows=size * plan.block_b * plan.block_k / (32 * plan.slices),  # as if each warp had all rows of its slice
        weights=weights,
        all_rows=size * plan.block_b * terms / threads if plan.resident else 0.0,
        units=plan.block_b * plan.block_h / plan.splits / threads,
    )


def _spills(problem: Problem, plan: Plan) -> str | None:
    """What takes more of a thread's registers than is known to fit."""
    if plan.exchange == "none":
        weights = 4 * plan.block_h**2 * problem.itemsize * plan.block_b // 16
        return "it holds all weights" if weights > 16 * KIB * plan.warps else None
    if problem.itemsize == 8 and (plan.warps < 8 or plan.block_b > 16):
        return "three products with fewer than 8 warps or more than 16 rows"
    registers = held(problem, plan)
    most_sums = 32 if registers.all_rows <= 256 and registers.weights <= 128 else 16
    if plan.exchange == "flag" and registers.sums > most_sums:
        return "it keeps the addresses of rows, to load them again"
    kind = "wgmma" if plan.uses_wgmma(problem.device) else "sliced" if plan.slices > 1 else "mma"
    most = _MOST[kind, plan.resident, problem.backward]
    for name, number, limit in zip(Held._fields, registers, most, strict=True):
        if number > limit:
            return f"{number:.0f} in {name.replace('_', ' ')}"
    return None
