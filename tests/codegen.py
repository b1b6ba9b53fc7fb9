"""Compiles the kernels' default plans for other machines, without a GPU, and prints what came out, a JSON line each.

Run by test_codegen.py in a process of its own: with TRITON_INTERPRET set there would be nothing to compile.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton_lstm.kernels import lstm_backward_kernel, lstm_forward_kernel
from triton_lstm.kernels.launch import constants, options
from triton_lstm.perf.exchange_loop import WARPS, exchange_constants, exchange_kernel
from triton_lstm.plan import Device, Plan, make_plan, shared_bytes

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Device("cuda", 108, 166912)),
    "sm_90": (GPUTarget("cuda", 90, 32), Device("cuda", 132, 232448)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Device("hip", 304, 65536)),
}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


def compile_kernel(kernel, target, dtype: str, plan: Plan, hidden_size: int, precision: str, reverse: bool, limit: int):
    """The compiled kernel, as `launch` would have it made."""
    values = constants(plan, TYPES[dtype], hidden_size, reverse=reverse, precision=precision, limit=limit)
    if not limit:
        values["error_ptr"] = None
    if plan.exchange != "barrier":
        values["counter_ptr"] = None
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in values:
            signature[name] = "constexpr"
        elif not name.endswith("_ptr"):
            signature[name] = "i32"
        else:
            wide = name in ("c_ptr", "c0_ptr", "dc_ptr", "c_all_ptr")
            signature[name] = "*i32" if name in ("counter_ptr", "error_ptr") else "*fp32" if wide else f"*{dtype}"
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in values.items()}, attributes)
    return triton.compile(source, target=target, options=options(plan, target.backend))


def disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes of stack, and the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [os.path.join(TOOLS, tool), flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack), code


def weight_loads(ttgir: str) -> tuple[int, int]:
    """How many loads from W_hh stand before the time loop and inside of it."""
    lines = ttgir.splitlines()
    loops = [k for k, line in enumerate(lines) if "scf.for" in line and "%step_begin" in line]
    pointers = {"%w_hh_ptr"}
    before = inside = 0
    for k, line in enumerate(lines):
        match = re.match(r"\s*(%[\w]+)(?::\d+)? = (\S+) (.*)", line)
        if not match or not pointers & set(re.findall(r"%\w+", match[3])):
            continue
        if match[2] == "tt.load":
            before, inside = (before + 1, inside) if k < loops[0] else (before, inside + 1)
        elif "tt.ptr" in line:
            pointers.add(match[1])
    return before, inside


def report(
    target: str,
    dtype: str,
    hidden_size: int,
    batch: int,
    backward: bool,
    precision: str,
    exchange: str | None = None,
    reverse: bool = False,
    limit: int = 0,
) -> dict:
    """What became of one default plan, or of its twin with another exchange."""
    gpu, device = TARGETS[target]
    itemsize = 8 if precision == "tf32x3" else TYPES[dtype].itemsize
    plan = make_plan(device, itemsize, batch, hidden_size, backward)
    plan = dataclasses.replace(plan, exchange=exchange or plan.exchange)
    kernel = lstm_backward_kernel if backward else lstm_forward_kernel
    compiled = compile_kernel(kernel, gpu, dtype, plan, hidden_size, precision, reverse, limit)
    before, inside = weight_loads(compiled.asm["ttgir"])
    result = {
        "target": target,
        "dtype": dtype,
        "precision": precision,
        "H": hidden_size,
        "B": batch,
        "backward": backward,
        "plan": dataclasses.asdict(plan),
        "shared": compiled.metadata.shared,
        "shared_estimate": shared_bytes(itemsize, hidden_size, backward, plan),
        "weight_loads_before_loop": before,
        "weight_loads_in_loop": inside,
    }
    if gpu.backend == "cuda":
        registers, stack, code = disassemble(compiled.asm["cubin"])
        result |= {
            "registers": registers,
            "stack": stack,
            "local_memory": len(re.findall(r"\b(?:LDL|STL)\b", code)),
            "tensor_core": len(re.findall(r"\b(?:HMMA|HGMMA)\b", code)),
            "polls": sorted(set(re.findall(r"ld\.volatile\.global\.(\S+)", compiled.asm["ptx"]))),
        }
    return result


def report_exchange(target: str, programs: int, flag: bool) -> dict:
    """The benchmarks' bare exchange."""
    gpu, _ = TARGETS[target]
    values = exchange_constants(programs, flag)
    signature = {
        name: "constexpr" if name in values else "i32" if not name.endswith("_ptr") else "*i32"
        for name in exchange_kernel.arg_names
    } | {"buffer_ptr": "*bf16"}
    indices = {(exchange_kernel.arg_names.index(k),): v for k, v in values.items()}
    attributes = {(0,): [["tt.divisibility", 16]]}
    compiled = triton.compile(
        ASTSource(exchange_kernel, signature, indices, attributes), target=gpu, options=dict(num_warps=WARPS)
    )
    _, stack, _ = disassemble(compiled.asm["cubin"])
    polls = re.findall(r"ld\.volatile\.global\.(\S+)", compiled.asm["ptx"])
    return {
        "stack": stack,
        "polls": sorted(set(polls)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.|ld\.acquire", compiled.asm["ptx"])),
    }


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        print(json.dumps(report_exchange(**case) if "programs" in case else report(**case)), flush=True)
