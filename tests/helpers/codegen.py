"""Compiles planned kernels for GPUs that are not here, and says what became of them, a row for each kernel.

`python tests/helpers/codegen.py --csv FILE` (make codegen) takes every config that the plan can choose, test_codegen.py
a few.
With TRITON_INTERPRET set there would be nothing to compile.
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import triton
from exchange_code import Row, exchanged, poll_bytes, unordered, width
from machine_code import count, inside_time_loop, weight_loads

from triton_lstm.perf.exchange_loop import WARPS, exchange_constants
from triton_lstm.perf.step import compiled
from triton_lstm.perf.step.machine_code import disassemble, parse
from triton_lstm.perf.step.model import NoModelError, model_step
from triton_lstm.perf.step.path import step_instructions
from triton_lstm.perf.step.timeline import Loop
from triton_lstm.planning.devices import GPUS
from triton_lstm.planning.limits import shared_bytes
from triton_lstm.planning.plan import Exchange, Plan
from triton_lstm.planning.problem import Problem
from triton_lstm.planning.space import make_plan
from triton_lstm.settings import DTYPES

TARGETS = ("A100", "RTX 3090", "H100", "B200", "RTX 5090", "MI300X")
HIDDEN = (32, 48, 64, 96, 128, 192, 256, 384, 512, 650, 768, 1024, 1536, 2048)
BATCHES = (16, 32, 64, 256, 1024)
SLOWER = 1.02
_AMD = {name: re.compile(rf"\.vgpr_{name}: +(\d+)") for name in ("count", "spill_count")}
# Their counts tell whether sums are fused alike
ARITHMETIC = {"FMUL": "FMUL2?", "FFMA": "FFMA2?", "MUFU": "MUFU", "MMA": "[A-Z]*MMA", "FADD": "FADD2?"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel to compile. exchange, limit: not the plan's, and a bound on every wait. directions: of time.

    states: with the loss's own gradients of c and the gates. save: what backward needs. record: "elements" of h's and
    c's total gradients, or "sums" of them. resets: with segments.
    """

    gpu: str
    dtype: str
    H: int
    B: int
    backward: bool
    exchange: str | None = None
    limit: int = 0
    directions: int = 1
    packed: bool = False
    states: bool = False
    save: bool = True
    record: str = ""
    resets: bool = False

    def __post_init__(self) -> None:
        plan = make_plan(self.problem)
        object.__setattr__(self, "plan", dataclasses.replace(plan, exchange=self.exchange or plan.exchange))

    plan: Plan = dataclasses.field(init=False, compare=False)

    @property
    def problem(self) -> Problem:
        return Problem(GPUS[self.gpu], self.dtype, self.B, self.H, self.backward, self.directions)

    @property
    def compiled_for(self) -> compiled.Variant:
        return compiled.Variant(self.limit, self.packed, self.states, self.save, self.record, self.resets)

    @property
    def variant(self) -> str:
        """What sets the kernel apart from that of one direction of time and dense rows."""
        return " ".join(["bidirectional"] * (self.directions == 2) + ["packed"] * self.packed)


def every_kernel() -> list[Kernel]:
    """Every kernel that the plan can choose, once: batch sizes with the same tile share one."""
    chosen: dict[Any, Kernel] = {}
    options = [
        *((dtype, {}) for dtype in compiled.PRECISION),
        ("bf16", dict(directions=2)),
        ("bf16", dict(packed=True)),
    ]
    for gpu, (dtype, variant), H, B, backward in itertools.product(TARGETS, options, HIDDEN, BATCHES, (False, True)):
        if GPUS[gpu].backend == "hip" and dtype == "tf32":
            continue  # there is none
        kernel = Kernel(gpu, dtype, H, B, backward, **variant)
        chosen.setdefault((gpu, dtype, H, backward, kernel.variant, dataclasses.replace(kernel.plan, groups=1)), kernel)
    return list(chosen.values())


def compile_kernel(kernel: Kernel) -> Any:
    return compiled.compile_kernel(kernel.problem, kernel.plan, kernel.compiled_for)


def report(kernel: Kernel) -> Row:
    """What became of a kernel; the columns of make codegen's table."""
    device, plan = GPUS[kernel.gpu], kernel.plan
    made = compile_kernel(kernel)
    before, inside = inside_time_loop(made.asm["ttgir"])
    loads_before, loads_inside = weight_loads(before, inside)
    row: Row = {
        "arch": device.arch,
        "dtype": kernel.dtype,
        "H": kernel.H,
        "B": kernel.B,
        "direction": "backward" if kernel.backward else "forward",
        "variant": kernel.variant,
        "plan": str(dataclasses.replace(plan, groups=1)),
        "exchange": plan.exchange,
        "resident": plan.resident,
        "shared": made.metadata.shared,
        "shared_planned": shared_bytes(kernel.problem, plan),
        "shared_device": device.shared_bytes,
        "weight_loads_before": loads_before,
        "weight_loads_in_loop": loads_inside,
        "conversions": sum("ttg.convert_layout" in line for line in inside),
        "conversions_fp32": sum(bool(re.search(r"ttg.convert_layout.*xf32", line)) for line in inside),
        "triton": triton.__version__,
        "segments": "kernels/segments.py" in made.asm["ttgir"],  # in its lines' origins
    }
    row |= exchanged(made, "dgates_ptr" if kernel.backward else "y_ptr")
    row |= row_bytes(kernel) | word_bytes(kernel)
    if device.backend == "hip":
        asm = made.asm["amdgcn"]
        registers, spilled = (int(pattern.search(asm)[1]) for pattern in _AMD.values())
        row |= {"registers": registers, "stack": 4 * spilled}
        return row | {"problems": problems(row)}
    registers, stack, code = disassemble(made.asm["cubin"])
    instructions = parse(code)
    of_step = step_instructions(instructions)
    step = [instruction.text for instruction in of_step]
    again = row["element"] if row["again"] else None
    row |= {
        "registers": registers,
        "stack": stack,
        "local_in_loop": count(r"\b(LDL|STL)\b", step),
        "instructions": len(step),
        "barriers": count(r"\bBAR\b", step),
        "arithmetic": {name: count(rf"\b({text})\b", step) for name, text in ARITHMETIC.items()},
        "tensor_core": count(r"MMA", step),
        "wgmma": count(r"HGMMA", step),
        "wgmma_planned": plan.uses_wgmma(device),
        "polls": " ".join(sorted(width(r) for r in row["reads"] if "volatile" in r and r != again)),
        "poll_bytes": kernel.problem.load_bytes,
        "whole": sum(i.width for i in of_step if i.kind == "load" and "STRONG.SYS" in i.name and i.width >= 8),
    }
    try:
        modelled = model_step(instructions, Loop.of(kernel.problem, plan))
    except NoModelError:
        return row | {"problems": problems(row)}
    row |= {
        "cycles": round(modelled.cycles),
        "cycles_waiting": round(modelled.waiting),
        "looks": round(modelled.looks, 2),
    }
    row |= {name.replace(" ", "_"): round(sum(parts.values())) for name, parts in modelled.phases.items()}
    return row | {"problems": problems(row)}


def row_bytes(kernel: Kernel) -> Row:
    """What each thread has to load of the exchanged rows, in the text: the product's chunks, or one if they are in a
    loop; of the flag exchange all of them again, or with a limit one chunk more, to look for what is missing."""
    plan, itemsize = kernel.plan, DTYPES[kernel.dtype].itemsize
    element = f"ld.volatile.global.b{8 * itemsize}"
    if plan.exchange == "none":
        return {"least_bytes": 0, "again": 0, "element": element}
    chunks = plan.sum_length(kernel.problem) // plan.block_k if plan.resident else 1
    chunk = plan.block_b * plan.block_k * itemsize // (plan.warps * GPUS[kernel.gpu].warp_size)
    again = 0
    if plan.exchange == "flag" and kernel.limit:
        chunks += 1
    elif plan.exchange == "flag":
        again = chunks * chunk
    distinct = kernel.problem.load_bytes > itemsize
    return {"least_bytes": chunks * chunk + again, "again": again if distinct else 0, "element": element}


def word_bytes(kernel: Kernel) -> Row:
    """What each thread stores and loads of words, in the text: all, after one to wait for."""
    plan, threads = kernel.plan, kernel.plan.warps * GPUS[kernel.gpu].warp_size
    if plan.splits == 1:
        return {"told": 0, "read": 0}
    own = max(1, plan.block_b * plan.block_h // plan.splits // threads)
    return {"told": 8 * plan.block_b * plan.block_h // threads, "read": 8 * (1 + plan.splits * own)}


def problems(row: Row) -> list[str]:
    """What is wrong with a kernel, with its numbers."""
    amd = row["arch"].startswith("gfx")
    wrong = []
    if row["resident"] and not (row["weight_loads_in_loop"] == 0 < row["weight_loads_before"]):
        wrong.append(f"resident, but {row['weight_loads_in_loop']} loads of W_hh in the time loop")
    if row["shared"] > row["shared_device"]:
        wrong.append(f"shared memory {row['shared']}, there {row['shared_device']}")
    wrong += unordered(row)
    if amd:
        return wrong + ["the flag exchange on AMD, which has no PTX"] * (row["exchange"] == "flag")
    if row["local_in_loop"]:
        wrong.append(
            f"{row['local_in_loop']} local-memory instructions in the time loop, {row['stack']} bytes of stack"
        )
    if row["shared"] > row["shared_planned"]:
        wrong.append(f"shared memory {row['shared']}, planned {row['shared_planned']}")
    if not row["tensor_core"]:
        wrong.append("no matrix instruction in the time loop")
    if bool(row["wgmma"]) != row["wgmma_planned"]:
        wrong.append(f"{row['wgmma']} wgmma, planned: {row['wgmma_planned']}")
    if row["exchange"] == "barrier" and row["whole"] < row["read"] - 8:  # what is only waited for may be narrower
        wrong.append(f"{row['whole']} bytes of words are whole in machine code, wanted: {row['read'] - 8}")
    least = min((poll_bytes(poll) for poll in row["polls"].split()), default=16)
    if row["exchange"] == "flag" and (not row["polls"] or least < row["poll_bytes"]):
        wrong.append(f"polls {row['polls'] or 'nothing'}, planned: {row['poll_bytes']} bytes a load")
    return wrong


def slower(row: Row, before: Mapping[str, str]) -> list[str]:
    """Which modelled cycles grew by more than 2%, beside a row of the table for the same kernel and batch.

    Another batch may have another number of programs share a processor. An empty column compares with nothing.
    """
    if before["B"] != str(row["B"]):
        return []
    return [
        f"{column}: {row[column]}, before {before[column]}"
        for column in ("cycles", "cycles_waiting")
        if before.get(column) and row[column] > SLOWER * float(before[column])
    ]


def report_exchange(gpu: str, programs: int, exchange: Exchange) -> Row:
    """The benchmarks' bare exchange."""
    values = exchange_constants(programs, exchange, GPUS[gpu].backend)
    made = compiled.compile_exchange(GPUS[gpu], programs, exchange)
    hip = GPUS[gpu].backend == "hip"
    stack = int(_AMD["spill_count"].search(made.asm["amdgcn"])[1]) if hip else disassemble(made.asm["cubin"])[1]
    row = {"arch": GPUS[gpu].arch, "exchange": exchange, "stack": stack}
    chunk = values["TILE"].BLOCK_B * values["TILE"].BLOCK_K * 2 // (32 * WARPS)  # bytes of bf16 a thread
    again = chunk if exchange == "flag" else 0
    row |= exchanged(made, "buffer_ptr", "signals_ptr" if hip else "counter_ptr")  # as `amd_accesses` names it
    row |= {"least_bytes": chunk + again, "again": again, "element": "ld.volatile.global.b16", "told": 0, "read": 0}
    return row | {"problems": unordered(row)}


def main() -> int:
    import pandas as pd
    from tqdm import tqdm

    parser = argparse.ArgumentParser()
    parser.add_argument("--csv", required=True)
    kernels = every_kernel()
    arguments = parser.parse_args()
    try:
        with ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
            rows = list(tqdm(pool.map(report, kernels), total=len(kernels), unit="kernel", disable=None))
    except KeyboardInterrupt:
        print(f"interrupted; {arguments.csv} is as it was", file=sys.stderr)
        os._exit(130)  # without waiting for the kernels that are being compiled
    frame = pd.DataFrame(rows)
    looked_at = [
        "reads",
        "least_bytes",
        "again",
        "element",
        "counter",
        "words",
        "told",
        "read",
        "whole",
        "order",
        "segments",
    ]
    frame = frame.drop(columns=["arithmetic", *looked_at])
    frame["problems"] = frame["problems"].map("; ".join)
    frame.to_csv(arguments.csv, index=False)
    shown = ["registers", "stack", "shared", "instructions", "conversions"]
    print(frame.groupby(["arch", "dtype", "direction"])[shown].max().to_string())
    bad = frame[frame["problems"] != ""]
    print(bad[["arch", "dtype", "H", "direction", "plan", "problems"]].to_string() if len(bad) else "no problems")
    return int(len(bad) > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--cases"]:
        for case in json.loads(sys.argv[2]):
            print(json.dumps(report_exchange(**case) if "programs" in case else report(Kernel(**case))), flush=True)
    else:
        sys.exit(main())
