"""Which way a call goes: the Triton kernels, or PyTorch's own LSTM."""

from __future__ import annotations

import os
from typing import Literal

import torch

Backend = Literal["auto", "triton", "torch"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def device_for(name: str | None = None) -> torch.device:
    """ "cuda" or "cpu" as a device; None is the GPU if there is one. On the CPU the kernels run in Triton's interpreter
    from now on, unless one of them has been imported already."""
    if (name or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        return torch.device("cuda", 0)
    os.environ["TRITON_INTERPRET"] = "1"
    return torch.device("cpu")


def why_not_triton(input: torch.Tensor, backend: str | None, packed: bool = False) -> str | None:
    """None if the kernels take a call with this `input`; else the reason, in words, why PyTorch's own LSTM does.

    backend: "auto", "triton", "torch", or None for the environment variable TRITON_LSTM_BACKEND ("auto" if unset).
    Raises ValueError for another one, RuntimeError where "triton" is asked for and cannot be had.
    """
    chosen = backend or os.environ.get("TRITON_LSTM_BACKEND") or "auto"
    if chosen not in ("auto", "triton", "torch"):
        where = "backend" if backend else "TRITON_LSTM_BACKEND"
        raise ValueError(f'{where} must be "auto", "triton" or "torch", got {chosen!r}')
    if chosen == "torch":
        return "PyTorch's path was asked for"
    reason = "no kernel for a PackedSequence yet" if packed else _no_kernel_for(input)
    if reason and chosen == "triton":
        raise RuntimeError(f'backend="triton" cannot run this call: {reason}. Use backend="auto" for PyTorch\'s path.')
    return reason


def _no_kernel_for(input: torch.Tensor) -> str | None:
    try:
        import numpy
        import triton
    except ImportError as error:
        return f"{error.name} is not installed"
    if torch.jit.is_tracing() or type(input) not in (torch.Tensor, torch.nn.Parameter):
        return f"a kernel cannot be traced or run on a {type(input).__name__}"
    if input.device.type == "cpu":
        if not _interpreting():
            return "the input is on the CPU and TRITON_INTERPRET=1 was not set before triton was imported"
        if _release(triton.__version__) < (3, 7) and _release(numpy.__version__) >= (2, 4):
            return f"the interpreter of triton {triton.__version__} needs NumPy < 2.4, this is {numpy.__version__}"
        return None if input.dtype in (*_DTYPES, torch.float64) else f"no kernel for {input.dtype}"
    if input.device.type != "cuda":
        return f"no kernel for {input.device.type} tensors"
    return None if input.dtype in _DTYPES else f"no kernel for {input.dtype} on a GPU"


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _interpreting() -> bool:
    if os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "on", "yes", "y"):
        return False
    from triton.language import cdiv
    from triton.runtime import JITFunction

    return not isinstance(cdiv, JITFunction)  # triton itself looks at the variable when it is imported
