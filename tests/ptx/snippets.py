"""Small kernels in PTX for the emulator's own tests."""

from __future__ import annotations

from typing import Any

from .gpu import poison
from .kernel import Kernel
from .machine import run
from .memory import Memory
from .schedule import Schedule
from .tensors import Allowed

HEADER = """
.version 8.4
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry snippet(
{parameters}
)
.reqntid {threads}
{{
.reg .pred %p<99>;
.reg .b16 %rs<99>;
.reg .b32 %r<99>;
.reg .b64 %rd<99>;
.reg .f32 %f<99>;
.reg .f64 %fd<99>;
"""
FOOTER = "ret;\n}\n"


def ptx(body: str, parameters: int, threads: int = 32) -> str:
    """A kernel whose `parameters` are pointers, in %rd1 and up; %r1 is the thread, %r2 the program."""
    listed = ",\n".join(f".param .u64 snippet_param_{k}" for k in range(parameters))
    loads = [f"ld.param.b64 %rd{k + 1}, [snippet_param_{k}];" for k in range(parameters)]
    first = "\n".join([*loads, "mov.u32 %r1, %tid.x;", "mov.u32 %r2, %ctaid.x;\n"])
    return HEADER.format(parameters=listed, threads=threads) + first + body + "\n" + FOOTER


def launch(
    body: str,
    *tensors: Any,
    threads: int = 32,
    programs: int = 1,
    shared: int = 0,
    cooperative: bool = True,
    schedule: Schedule | None = None,
    allowed: list[Allowed] | None = None,
    inputs: tuple[int, ...] = (),
) -> Memory:
    """Runs a kernel on NumPy arrays, named a, b, c..., which it changes. inputs: those that it may not store to.

    Elements with the bits of gpu.POISON count as never written.
    """
    arguments = []
    for k, tensor in enumerate(tensors):
        bits = tensor.reshape(-1).view(f"u{tensor.itemsize}")
        arguments.append(("abcdefgh"[k], bits, bits != poison(bits.dtype), 0, k in inputs))
    return run(
        Kernel(ptx(body, len(tensors), threads)),
        arguments,
        (programs, 1, 1),
        shared,
        cooperative=cooperative,
        schedule=schedule or Schedule(),
        allowed=allowed or [],
    )
