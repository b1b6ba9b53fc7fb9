"""Planned kernels, compiled for GPUs that need not be here, and what the model says of them.

With TRITON_INTERPRET set there is nothing to compile.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from triton_lstm.kernels import lstm_backward_kernel, lstm_forward_kernel
from triton_lstm.kernels.launch import Layer, options
from triton_lstm.perf.exchange_loop import WARPS, exchange_constants, exchange_kernel
from triton_lstm.perf.step.constants import FITTED, H100, Constants
from triton_lstm.perf.step.machine_code import disassemble, parse, why_no_tools
from triton_lstm.perf.step.model import NoModelError, Step, model_step, why_no_model
from triton_lstm.perf.step.timeline import Loop
from triton_lstm.planning.devices import Device
from triton_lstm.planning.plan import Exchange, Plan
from triton_lstm.planning.problem import Problem
from triton_lstm.settings import DTYPES

PRECISION = {"bf16": "ieee", "fp16": "ieee", "tf32": "tf32", "fp32": "tf32x3"}  # tl.dot's, on NVIDIA


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for besides its problem and plan.

    limit: a bound on every wait. resets: with segments. states: with the loss's own gradients of c and the gates. save:
    what backward needs. record: "elements" of h's and c's total gradients, or "sums" of them.
    """

    limit: int = 0
    packed: bool = False
    states: bool = False
    save: bool = True
    record: str = ""
    resets: bool = False


def compile_kernel(problem: Problem, plan: Plan, variant: Variant = Variant()) -> Any:
    """As `launch` would have it compiled, with h0, c0 and the gradient of c_n given."""
    device, dtype = problem.device, DTYPES[problem.precision]
    function = lstm_backward_kernel if problem.backward else lstm_forward_kernel
    precision = "ieee" if device.backend == "hip" else PRECISION[problem.precision]
    sizes = problem.H, problem.directions
    layer = Layer.of(plan.exchange, dtype, *sizes, precision, variant.limit, problem.backward, device.backend)
    values: dict[str, Any] = dict(LAYER=layer, TILE=plan.tile, FIRST_DIRECTION=0)
    if not variant.limit and plan.exchange == "none":
        values["signals_ptr"] = None
    if plan.splits == 1:
        values["parts_ptr"] = None
    if not variant.packed:
        values |= {"starts_ptr": None, "lengths_ptr": None}
    elif not problem.backward:
        values["h0_ptr"] = None
    if not variant.resets:
        values["resets_ptr"] = None
    if dtype == torch.float32 and not problem.backward:
        values["c_n_ptr"] = None
    if plan.exchange != "none" and not problem.backward:
        values["h_n_ptr"] = None
    if problem.backward and not variant.states:
        values |= {"dact_ptr": None, "dc_all_ptr": None}
    if problem.backward:
        values |= {"TOTALS": variant.record, "DC_N": True}
    if not variant.record:
        values["totals_ptr"] = None
    values = {name: value for name, value in values.items() if name in function.arg_names}
    if not variant.save:
        values |= {"gates_ptr": None, "c_all_ptr": None}
    element = "fp32" if dtype == torch.float32 else problem.precision
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in values:
            signature[name] = "constexpr"
        elif not name.endswith("_ptr"):
            signature[name] = "i32"
        else:
            wide = name in ("c_ptr", "c0_ptr", "dc_ptr", "c_all_ptr", "dc_all_ptr", "totals_ptr")
            other = {"signals_ptr": "*i32", "parts_ptr": "*i64", "lengths_ptr": "*i32", "starts_ptr": "*i64"}
            other["resets_ptr"] = "*u8"
            if variant.record == "sums":
                other["totals_ptr"] = "*fp64"
            signature[name] = other.get(name, "*fp32" if wide else f"*{element}")
            attributes[(position,)] = [["tt.divisibility", 16]]
    indices = {(function.arg_names.index(name),): value for name, value in values.items()}
    source = ASTSource(function, signature, indices, attributes)
    return triton.compile(source, target=target(device), options=options(plan, device.backend))


def compile_exchange(device: Device, programs: int, exchange: Exchange) -> Any:
    """The benchmarks' bare exchange."""
    values = exchange_constants(programs, exchange, device.backend)
    signature = {
        name: "constexpr" if name in values else "i32" if not name.endswith("_ptr") else "*i32"
        for name in exchange_kernel.arg_names
    } | {"buffer_ptr": "*bf16"}
    indices = {(exchange_kernel.arg_names.index(name),): value for name, value in values.items()}
    source = ASTSource(exchange_kernel, signature, indices, {(0,): [["tt.divisibility", 16]]})
    return triton.compile(source, target=target(device), options=dict(num_warps=WARPS))


def target(device: Device) -> GPUTarget:
    arch: Any = device.arch if device.backend == "hip" else int(device.arch.removeprefix("sm_"))
    return GPUTarget(device.backend, arch, device.warp_size)


def why_not_modelled(device: Device) -> str | None:
    """The reason why no kernel for a device can be modelled here, or None."""
    if reason := why_no_model(device.arch):
        return reason
    if not isinstance(tl.cdiv, JITFunction):
        return "with TRITON_INTERPRET set, kernels are not compiled"
    return why_no_tools()


def modelled(problem: Problem, plan: Plan, *constants: Constants) -> list[Step]:
    """The model of a plan's kernel, which is compiled for it, a second or more: one for each set of constants.

    Raises NoModelError where there is no model, with the reason.
    """
    if reason := why_not_modelled(problem.device):
        raise NoModelError(reason)
    code = parse(disassemble(compile_kernel(problem, plan).asm["cubin"])[2])
    return [model_step(code, Loop.of(problem, plan), each) for each in constants]


def in_words(problem: Problem, plan: Plan) -> str:
    """The same in words, also where there is no model; for `explain`."""
    try:
        step, fitted = modelled(problem, plan, H100, FITTED)
    except (ValueError, OSError, RuntimeError) as error:  # the last one is what a failed compilation raises
        return f"not: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return f"{step}; {fitted.us(fitted.waiting):.2f} with constants fitted to an H100"
