"""Launches a time-loop kernel: all steps at once where its programs can wait for each other, else step by step."""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import JITFunction
from triton.runtime.errors import OutOfResources

from triton_lstm.kernels.exchange import COPIES, INT_TYPE, LINE, SENTINEL, make_ready
from triton_lstm.kernels.parts import parts_for
from triton_lstm.planning.devices import INTERPRETER, Device
from triton_lstm.planning.limits import REGISTERS, directions_at_once
from triton_lstm.planning.plan import Plan
from triton_lstm.planning.problem import Problem
from triton_lstm.planning.space import streamed
from triton_lstm.settings import precision_name, product_precision, spin_limit

_TRITON_TYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
_refused: set[tuple[torch.device, Plan, tuple[int, ...]]] = set()  # cooperative launches that a device would not take


class ForkSafeLock:
    """A lock that is free in a forked child, which has none of the threads that could release an inherited one."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.lock = threading.RLock()


_interpreter = ForkSafeLock()  # Triton's interpreter patches its own modules during a launch


class _Interpreting:
    """Exclusive use of Triton's interpreter, without NumPy's warnings about infinity and NaN."""

    def __enter__(self) -> None:
        self.lock, self.errors = _interpreter.lock, np.errstate(all="ignore")
        self.lock.acquire()
        self.errors.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self.errors.__exit__(*raised)
        self.lock.release()


def launching(device: torch.device) -> Any:
    """The context of a launch: its GPU as the current device, or exclusive use of Triton's interpreter."""
    return torch.cuda.device(device) if isinstance(tl.cdiv, JITFunction) else _Interpreting()


@functools.cache
def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of c, of sums and of the gradients carried through time: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


@functools.cache
def device_facts(device: torch.device) -> Device:
    if not isinstance(tl.cdiv, JITFunction):
        return INTERPRETER
    try:
        current = torch.cuda.device(device)
    except ValueError:  # no GPU's: of a program that was exported with TRITON_INTERPRET=1
        raise RuntimeError(
            f"the kernels cannot run on {device} here: set TRITON_INTERPRET=1 before triton is imported, or export the "
            "program where it is to run"
        ) from None
    with current:
        target = triton.runtime.driver.active.get_current_target()
    facts = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    arch = str(target.arch) if torch.version.hip else f"sm_{target.arch}"
    return Device(
        name=torch.cuda.get_device_name(device),
        backend="hip" if torch.version.hip else "cuda",
        arch=arch,
        processors=facts["multiprocessor_count"],
        shared_bytes=facts["max_shared_mem"],
        registers=facts["max_num_regs"],
        l2_bytes=torch.cuda.get_device_properties(device).L2_cache_size,
        warp_size=target.warp_size,
    )


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a kernel is compiled for besides a plan's tile: a constexpr of the kernels.

    H, D: hidden units, directions of time. K: terms of the recurrent product's sum; GATES: its columns for each unit.
    EXCHANGE: the plan's. PRECISION: of `tl.dot`. ACC: the accumulator's type. SENTINEL, INT: see exchange.py.
    SPIN_LIMIT: looks before a wait gives up; 0: no limit. BACKEND: the device's.
    """

    H: int
    D: int
    K: int
    GATES: int
    EXCHANGE: str
    PRECISION: str
    ACC: tl.dtype
    SENTINEL: int
    INT: tl.dtype
    SPIN_LIMIT: int
    BACKEND: str

    @staticmethod
    @functools.cache
    def of(
        exchange: str,
        dtype: torch.dtype,
        hidden_size: int,
        directions: int,
        precision: str,
        limit: int,
        backward: bool,
        backend: str,
    ) -> Layer:
        return Layer(
            H=hidden_size,
            D=directions,
            K=4 * hidden_size if backward else hidden_size,
            GATES=1 if backward else 4,
            EXCHANGE=exchange,
            PRECISION=precision,
            ACC=_TRITON_TYPE[accumulator(dtype)],
            SENTINEL=SENTINEL,
            INT=INT_TYPE[dtype.itemsize][1],
            SPIN_LIMIT=limit,
            BACKEND=backend,
        )


def options(plan: Plan, backend: str) -> dict[str, int]:
    """How a kernel is compiled."""
    # Triton 3.10 will no longer fuse multiply and add by default, which changes bits and speed
    chosen = dict(num_warps=plan.warps, num_stages=1, enable_fp_fusion=True)
    if backend == "cuda":  # by default ptxas spills for an occupancy that is not needed
        chosen["maxnreg"] = REGISTERS
    return chosen


def sizes_of(exchanged: torch.Tensor, arguments: dict[str, Any]) -> tuple[int, int, int, int]:
    """D, T, B and H of what a time loop's arguments describe."""
    D, B, H = arguments["c_ptr" if "c_ptr" in arguments else "dc_ptr"].shape
    starts = arguments["starts_ptr"]
    return D, exchanged.shape[0] if starts is None else starts.shape[0] - 2, B, H


def signals_for(exchange: str, limit: int, D: int, B: int, block_b: int, device: torch.device) -> torch.Tensor | None:
    """Whether a wait gave up, and the counters of arrivals, one for each batch tile and direction; or None."""
    if exchange == "none" and not limit:
        return None
    return torch.empty(1 + COPIES.value * D * -(-B // block_b), LINE.value, dtype=torch.int32, device=device)


class Prepared(NamedTuple):
    """What all launches of a plan have in common.

    constants: compile-time arguments and options. grid: of as many directions as run beside each other.
    """

    constants: dict[str, Any]
    grid: tuple[int, int, int]


@functools.lru_cache(maxsize=1024)
def _prepared(
    device: torch.device,
    plan: Plan,
    dtype: torch.dtype,
    D: int,
    B: int,
    H: int,
    precision: str,
    limit: int,
    backward: bool,
) -> Prepared:
    facts = device_facts(device)
    problem = Problem(facts, precision_name(dtype, device), B, H, backward, D)
    layer = Layer.of(plan.exchange, dtype, H, D, precision, limit, backward, facts.backend)
    constants = dict(LAYER=layer, TILE=plan.tile, **options(plan, facts.backend))
    return Prepared(constants, (*plan.grid(H), directions_at_once(problem, plan)))


def launch(kernel: Any, plan: Plan, exchanged: torch.Tensor, arguments: dict[str, Any]) -> None:
    """Runs all steps of `kernel` on `arguments`, in both directions of time if there are two.

    exchanged: the buffer, among the arguments, through which programs see each other's rows.

    Raises RuntimeError where a wait ran out of TRITON_LSTM_SPIN_LIMIT looks, or is set while a CUDA graph is captured.
    """
    if exchanged.numel() == 0:
        return
    device, dtype = exchanged.device, exchanged.dtype
    D, T, B, H = sizes_of(exchanged, arguments)
    limit = _limit_for(device)
    precision = product_precision(dtype, device)
    backward = "dgates_ptr" in arguments
    constants, grid = _prepared(device, plan, dtype, D, B, H, precision, limit, backward)
    signals = parts = None
    if plan.exchange != "none" or limit:
        signals = signals_for(plan.exchange, limit, D, B, plan.block_b, device)
        if plan.splits > 1:
            parts = parts_for(plan, D, B, H, device)
        make_ready(plan.exchange, exchanged, signals, parts)
    arguments |= constants | dict(signals_ptr=signals, T=T, B=B)
    if backward:
        arguments["parts_ptr"] = parts
    if grid[2] == 2 and (device, plan, grid) in _refused:
        grid = (*grid[:2], 1)
    with launching(device):
        for first in range(0, D, grid[2]):
            arguments["FIRST_DIRECTION"] = first
            try:
                _launch_steps(kernel[grid], plan, grid, T, arguments, device)
            except OutOfResources as shortage:  # nothing ran
                smaller = streamed(plan, exchanged.element_size())
                if not plan.resident or plan.exchange == "none":
                    raise
                warnings.warn(
                    f"{plan} needs more than {device} has ({shortage}); its weights are streamed.", stacklevel=2
                )
                _launch_steps(kernel[grid], smaller, grid, T, arguments | dict(TILE=smaller.tile), device)
    if limit and signals is not None and signals[0, 0]:
        raise RuntimeError(
            f"a program waited for another one's rows or sums more than TRITON_LSTM_SPIN_LIMIT={limit} times and gave "
            f"up; the results are not complete. Plan: {plan}"
        )


def _limit_for(device: torch.device) -> int:
    limit = spin_limit()
    if limit and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a CUDA graph cannot check whether TRITON_LSTM_SPIN_LIMIT ran out: unset it to capture one")
    return limit


def refuses_cooperation(error: Exception) -> bool:
    """Whether a device would not take a launch whose programs may wait for each other."""
    return "ooperative" in str(error) or "not supported" in str(error)


def _launch_steps(
    launcher: Any,
    plan: Plan,
    grid: tuple[int, ...],
    steps: int,
    arguments: dict[str, Any],
    device: torch.device,
) -> None:
    """All steps at once, or one by one where programs would have to wait for each other and cannot."""
    if plan.exchange == "none":
        launcher(step_begin=0, step_end=steps, **arguments)
        return
    if plan.one_launch and (device, plan, grid) not in _refused:
        try:
            launcher(step_begin=0, step_end=steps, launch_cooperative_grid=True, **arguments)
            return
        except (RuntimeError, AssertionError) as refusal:  # the latter on AMD
            if not refuses_cooperation(refusal):
                raise
            _refused.add((device, plan, grid))
            warnings.warn(
                f"{device} refused a cooperative launch ({refusal}); triton_lstm launches every time step separately "
                "there, which is slower. A GPU shared through MPS or MIG, or by another process, is the usual reason.",
                stacklevel=2,
            )
    if plan.splits > 1:  # programs would wait for each other within a step
        arguments = arguments | dict(TILE=plan.on_one_axis.tile, parts_ptr=None)
    for step in range(steps):
        launcher(step_begin=step, step_end=step + 1, **arguments)
