"""Which way a call goes, kernels or PyTorch's own LSTM, in which precision; what switches and the environment say."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch

Backend = Literal["auto", "triton", "torch"]
MARGIN = 0.05  # by which PyTorch's path must have been faster to be taken
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def device_for(name: str | None = None) -> torch.device:
    """ "cuda" or "cpu" as a device; None is the GPU if there is one. On the CPU the kernels run in Triton's interpreter
    from now on, unless one of them has been imported already."""
    if (name or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        return torch.device("cuda", 0)
    os.environ["TRITON_INTERPRET"] = "1"
    return torch.device("cpu")


def chosen_backend(backend: str | None) -> str:
    """`backend`, or TRITON_LSTM_BACKEND, or "auto". Raises ValueError for anything else than the three."""
    chosen = backend if backend is not None else os.environ.get("TRITON_LSTM_BACKEND") or "auto"
    if chosen not in ("auto", "triton", "torch"):
        where = "TRITON_LSTM_BACKEND" if backend is None else "backend"
        raise ValueError(f'{where} must be "auto", "triton" or "torch", got {chosen!r}')
    return chosen


def why_torch_is_faster(
    gpu: str | None,
    input: torch.Tensor,
    backend: str | None,
    batch: int,
    params: Sequence[torch.Tensor],
    has_biases: bool,
    hx: Sequence[torch.Tensor] | None = None,
) -> str | None:
    """The reason why a call that the kernels could take goes to PyTorch's LSTM all the same: a tuned table has measured
    it to be faster there. None unless that is known, and both do the same: one layer and direction, as measured, and no
    gradient, which the kernels give where cuDNN gives none (in eval mode, twice).

    Under "auto" only. gpu: the name of the GPU, None for the input's own. params: as `lstm` takes them.
    """
    if len(params) != (4 if has_biases else 2) or chosen_backend(backend) != "auto":
        return None
    if (gpu is None and input.device.type != "cuda") or torch.is_autocast_enabled("cuda"):
        return None
    if wants_gradient(input, *params, *(() if hx is None else hx)) or torch._C._are_functorch_transforms_active():
        return None
    from triton_lstm.tables import layer_time

    device = torch.device("cuda") if gpu else input.device
    name, hidden_size = gpu or torch.cuda.get_device_name(input.device), params[1].shape[1]
    time = layer_time(name, "inference", precision_name(input.dtype, device), hidden_size, batch)
    if time is None or time.torch_us > (1 - MARGIN) * time.triton_us:
        return None
    return f"it was measured faster there: {time.torch_us:.2f} us a step, {time.triton_us:.2f} in the kernels"


def wants_gradient(*tensors: torch.Tensor) -> bool:
    """Whether a call on these may be followed by a backward pass."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def why_not_triton(input: torch.Tensor, backend: str | None, *others: torch.Tensor) -> str | None:
    """None if the kernels take a call with this `input`; else the reason, in words, why PyTorch's own LSTM does.

    others: the call's weights and states.

    backend: "auto", "triton", "torch", or None for the environment variable TRITON_LSTM_BACKEND ("auto" if unset).
    Raises ValueError for another one, RuntimeError where "triton" is asked for and cannot be had.
    """
    if torch.compiler.is_compiling():
        from triton_lstm.compiled import decided

        chosen, reason = decided(input.device.type, input.dtype, backend)
    else:
        chosen, reason = chosen_backend(backend), _cannot_run_on(input, *others)
        if chosen != "torch":
            reason = reason or no_kernel_for(input.device.type, input.dtype)
    if chosen == "torch":
        return "PyTorch's path was asked for"
    if reason and chosen == "triton":
        raise RuntimeError(f'backend="triton" cannot run this call: {reason}. Use backend="auto" for PyTorch\'s path.')
    return reason


def _cannot_run_on(*tensors: torch.Tensor) -> str | None:
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    if torch.jit.is_tracing() or any(type(m).__name__ in ("FakeTensorMode", "ProxyTorchDispatchMode") for m in modes):
        return "a kernel cannot be traced"
    kinds = (type(t) for t in tensors if type(t) not in (torch.Tensor, torch.nn.Parameter))
    kind = next(kinds, None)
    return None if kind is None else f"a kernel cannot be run on a {kind.__name__}"


def no_kernel_for(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take such tensors, in words."""
    try:
        import numpy
        import triton
    except ImportError as error:
        return f"{error.name} is not installed"
    if device_type == "cpu":
        if not _interpreting():
            return "the input is on the CPU and TRITON_INTERPRET=1 was not set before triton was imported"
        if release(triton.__version__) < (3, 7) and release(numpy.__version__) >= (2, 4):
            return f"the interpreter of triton {triton.__version__} needs NumPy < 2.4, this is {numpy.__version__}"
        return None if dtype in (*_DTYPES, torch.float64) else f"no kernel for {dtype}"
    if device_type != "cuda":
        return f"no kernel for {device_type} tensors"
    return None if dtype in _DTYPES else f"no kernel for {dtype} on a GPU"


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _interpreting() -> bool:
    if os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "on", "yes", "y"):
        return False
    from triton.language import cdiv
    from triton.runtime import JITFunction

    return not isinstance(cdiv, JITFunction)  # triton itself looks at the variable when it is imported


def product_precision(dtype: torch.dtype, device: torch.device) -> str:
    """tl.dot's input_precision. On NVIDIA float32 follows TRITON_LSTM_FP32, or the switch that cuDNN's RNNs follow:
    "tf32", or "tf32x3", three products for about float32's own precision; "ieee" leaves the tensor cores.

    Raises ValueError for another value of TRITON_LSTM_FP32.
    """
    chosen = os.environ.get("TRITON_LSTM_FP32")
    if chosen and chosen not in ("tf32", "tf32x3", "ieee"):
        raise ValueError(f'TRITON_LSTM_FP32 must be "tf32", "tf32x3" or "ieee", got {chosen!r}')
    if dtype != torch.float32 or device.type != "cuda" or torch.version.hip:
        return "ieee"
    if chosen:
        return chosen
    # allow_tf32, which sets this one too, raises where convolutions and RNNs are set differently
    rnn: Any = torch.backends.cudnn.rnn
    return "tf32" if rnn.fp32_precision == "tf32" else "tf32x3"


def precision_name(dtype: torch.dtype, device: torch.device) -> str:
    """What tables and benchmarks call it: bf16, fp16, tf32, fp32 or fp64."""
    if product_precision(dtype, device) == "tf32":
        return "tf32"
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}[dtype]


def wants_tuning(device: torch.device) -> bool:
    """Whether a first call may tune: compiled on a GPU, if TRITON_LSTM_AUTOTUNE=1, not while a CUDA graph is captured.

    Raises ValueError for another value than 0 or 1.
    """
    chosen = os.environ.get("TRITON_LSTM_AUTOTUNE") or "0"
    if chosen not in ("0", "1"):
        raise ValueError(f"TRITON_LSTM_AUTOTUNE must be 0 or 1, got {chosen!r}")
    if chosen == "0" or device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    return not torch.cuda.is_current_stream_capturing()


def spin_limit() -> int:
    """How often a wait looks before it gives up; 0, for ever, unless TRITON_LSTM_SPIN_LIMIT says otherwise."""
    text = os.environ.get("TRITON_LSTM_SPIN_LIMIT") or "0"
    if not text.isascii() or not text.isdigit() or int(text) >= 1 << 31:
        raise ValueError(f"TRITON_LSTM_SPIN_LIMIT must be a whole number from 0 to {(1 << 31) - 1}, got {text!r}")
    return int(text)
