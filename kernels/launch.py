"""Launches a time-loop kernel: all steps at once where its programs can wait for each other, else step by step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import JITFunction
from triton.runtime.errors import OutOfResources

from triton_lstm.backend import precision_name, product_precision, spin_limit
from triton_lstm.devices import INTERPRETER, Device
from triton_lstm.kernels.exchange import INT_TYPE, SENTINEL, make_ready
from triton_lstm.limits import REGISTERS
from triton_lstm.plan import Plan, streamed

_TRITON_TYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
_refused: set[tuple[torch.device, Plan, tuple[int, ...]]] = set()  # cooperative launches that a device would not take


class Turns:
    """Lets one thread in at a time. A forked child begins with nobody inside: it has none of the other threads, so what
    it inherited locked would stay so."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        with self._lock:
            yield


_interpreter = Turns()  # Triton's interpreter patches its own modules during a launch


@contextlib.contextmanager
def launching(device: torch.device) -> Iterator[None]:
    """What a launch wants around it: its GPU as the current one; interpreted, its turn, and a NumPy that takes infinity
    and NaN as quietly as a GPU does."""
    if isinstance(tl.cdiv, JITFunction):
        with torch.cuda.device(device):
            yield
    else:
        with _interpreter.taken(), np.errstate(all="ignore"):
            yield


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of c, of sums and of the gradients carried through time: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


@functools.cache
def device_facts(device: torch.device) -> Device:
    if not isinstance(tl.cdiv, JITFunction):
        return INTERPRETER
    with torch.cuda.device(device):
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


def tile(plan: Plan) -> dict[str, Any]:
    """The part of a plan that a kernel is compiled for, less the exchange."""
    return dict(
        RESIDENT=plan.resident,
        BLOCK_B=plan.block_b,
        BLOCK_H=plan.block_h,
        BLOCK_K=plan.block_k,
        SLICES=plan.slices,
    )


def constants(
    exchange: str, dtype: torch.dtype, hidden_size: int, *, directions: int, precision: str, limit: int
) -> dict[str, Any]:
    """What a kernel is compiled for besides a plan's tile."""
    return dict(
        H=hidden_size,
        D=directions,
        EXCHANGE=exchange,
        PRECISION=precision,
        ACC=_TRITON_TYPE[accumulator(dtype)],
        SENTINEL=SENTINEL[dtype.itemsize],
        INT=INT_TYPE[dtype.itemsize][1],
        SPIN_LIMIT=limit,
    )


def options(plan: Plan, backend: str) -> dict[str, int]:
    """How a kernel is compiled."""
    chosen = dict(num_warps=plan.warps, num_stages=1)
    if backend == "cuda":  # on its own ptxas spills for an occupancy that nobody asks for
        chosen["maxnreg"] = REGISTERS
    return chosen


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the problem that a time loop's arguments describe: directions of time, steps, batch, hidden units."""

    D: int
    T: int
    B: int
    H: int

    @classmethod
    def of(cls, exchanged: torch.Tensor, arguments: dict[str, Any]) -> Size:
        D, _, H = arguments["w_hh_ptr"].shape
        B = arguments["c_ptr" if "c_ptr" in arguments else "dc_ptr"].shape[0]
        starts = arguments["starts_ptr"]
        return cls(D, exchanged.shape[0] if starts is None else starts.shape[0] - 2, B, H)


def counter_for(exchange: str, size: Size, block_b: int, device: torch.device) -> torch.Tensor | None:
    """The barrier's counters, one for each batch tile and direction; None where there is no barrier."""
    if exchange != "barrier":
        return None
    return torch.empty(size.D, -(-size.B // block_b), dtype=torch.int32, device=device)


def _limit_for(device: torch.device) -> int:
    limit = spin_limit()
    if limit and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a CUDA graph cannot look whether TRITON_LSTM_SPIN_LIMIT ran out: unset it to capture one")
    return limit


def launch(kernel: Any, plan: Plan, exchanged: torch.Tensor, arguments: dict[str, Any]) -> None:
    """Runs all steps of `kernel` on `arguments`, in both directions of time if there are two.

    exchanged: the buffer, among the arguments, through which programs see each other's rows.

    Raises RuntimeError where a wait ran out of TRITON_LSTM_SPIN_LIMIT looks, or is set while a CUDA graph is captured.
    """
    if exchanged.numel() == 0:
        return
    device = exchanged.device
    facts = device_facts(device)
    size = Size.of(exchanged, arguments)
    limit = _limit_for(device)
    error = torch.zeros(1, dtype=torch.int32, device=device) if limit else None
    counter = counter_for(plan.exchange, size, plan.block_b, device)
    make_ready(plan.exchange, exchanged, counter)
    precision = product_precision(exchanged.dtype, device)
    arguments = dict(
        **arguments,
        counter_ptr=counter,
        error_ptr=error,
        T=size.T,
        B=size.B,
        **constants(plan.exchange, exchanged.dtype, size.H, directions=size.D, precision=precision, limit=limit),
        **tile(plan),
        **options(plan, facts.backend),
    )
    beside, grid = size.D, (*plan.grid(size.H), size.D)
    if size.D == 2:
        itemsize = facts.itemsize(precision_name(exchanged.dtype, device))
        fit = plan.beside(facts, itemsize, size.H, "dgates_ptr" in arguments)
        if not fit or (device, plan, grid) in _refused:
            beside, grid = 1, (*plan.grid(size.H), 1)
    with launching(device):
        for first in range(0, size.D, beside):
            arguments["first_direction"] = first
            try:
                _launch_steps(kernel[grid], plan, grid, size.T, arguments, device)
            except OutOfResources as shortage:  # nothing ran
                smaller = streamed(plan, exchanged.element_size())
                if not plan.resident or plan.exchange == "none":
                    raise
                warnings.warn(
                    f"{plan} needs more than {device} has ({shortage}); its weights are streamed.", stacklevel=2
                )
                _launch_steps(kernel[grid], smaller, grid, size.T, arguments | tile(smaller), device)
    if error is not None and error.item():
        raise RuntimeError(
            f"a program waited for another one's rows more than TRITON_LSTM_SPIN_LIMIT={limit} times and gave up; "
            f"the results are not complete. Plan: {plan}"
        )


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
                f"{device} refused a cooperative launch ({refusal}); triton_lstm launches every time step by itself "
                "there, which is slower. A GPU shared through MPS or MIG, or by another process, is the usual reason.",
                stacklevel=2,
            )
    for step in range(steps):
        launcher(step_begin=step, step_end=step + 1, **arguments)
