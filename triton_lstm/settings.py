"""The table of environment variables, and PyTorch's switches; dtype names; usage errors."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch

from triton_lstm.system.installed import why_no_triton

Backend = Literal["auto", "triton", "torch"]


class Variable(NamedTuple):
    """An environment variable: its valid values, its default, and its meaning."""

    values: str
    default: str
    meaning: str


ENVIRONMENT = {
    "TRITON_LSTM_BACKEND": Variable(
        "auto, triton, torch", "auto", "backend of modules and calls without backend=; read on every call"
    ),
    "TRITON_LSTM_FP32": Variable(
        "tf32, tf32x3, ieee",
        "follows torch.backends.cudnn.rnn.fp32_precision",
        "precision of float32 matmuls on NVIDIA GPUs; takes precedence over PyTorch's switch",
    ),
    "TRITON_LSTM_AUTOTUNE": Variable("0, 1", "0", "1: the first call with a shape measures its configs"),
    "TRITON_LSTM_TUNED": Variable("a folder", "the platform's cache folder", "where tuned tables are read and written"),
    "TRITON_LSTM_SPIN_LIMIT": Variable(
        "an integer below 2**31",
        "0: no limit",
        "how often a program looks at a counter, or for other programs' rows or sums, before it gives up",
    ),
    "TRITON_INTERPRET": Variable(
        "0, 1", "0", "Triton's own, read when triton is imported; 1: the kernels run on the CPU, in its interpreter"
    ),
}

# The names in all commands, tables and results; tf32 and fp32 are float32 with TF32 allowed or not
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
SPELLINGS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}  # PyTorch's, also accepted


def dtype_name(text: str) -> str:
    """The name in DTYPES of one of PyTorch's names; any other text unchanged."""
    return SPELLINGS.get(text, text)


@contextlib.contextmanager
def switches(precision: str) -> Iterator[None]:
    """Sets PyTorch's TF32 switches, for cuDNN and for matmuls, to whether precision is "tf32"; restores them."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


LARGEST, SEEDS = 1 << 31, 1 << 32  # the limits of sizes and of seeds
SHOWING = ("pandas", "matplotlib", "rich", "tabulate", "jinja2")  # the extra `perf`


class UsageError(Exception):
    """An error that the user can fix; its message says how."""


def require(*packages: str, extra: str = "perf") -> None:
    """Raises UsageError for a package that cannot be imported, or a triton that cannot be used.

    extra: the optional dependencies in pyproject.toml that have the packages.
    """
    for package in packages:
        if package == "triton" and (reason := why_no_triton()):
            raise UsageError(f"this requires triton: {reason}")
        try:
            __import__(package)
        except ImportError:
            raise UsageError(f'this requires {package}: pip install ".[{extra}]" in the checkout') from None
        except Exception as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(f"{package} cannot be imported: {why}") from None


def device_for(name: str | None = None) -> torch.device:
    """ "cuda" or "cpu" as a device; None is the GPU if there is one. On the CPU this enables Triton's interpreter for
    all kernels that are not imported yet."""
    if (name or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        return torch.device("cuda", 0)
    os.environ["TRITON_INTERPRET"] = "1"
    return torch.device("cpu")


def chosen_backend(backend: str | None) -> str:
    """`backend`, else TRITON_LSTM_BACKEND, else "auto". Raises ValueError for any other value."""
    chosen = backend if backend is not None else os.environ.get("TRITON_LSTM_BACKEND") or "auto"
    if chosen not in ("auto", "triton", "torch"):
        where = "TRITON_LSTM_BACKEND" if backend is None else "backend"
        raise ValueError(f'{where} must be "auto", "triton" or "torch", got {chosen!r}')
    return chosen


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether a call with these tensors may be followed by a backward pass."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # no generator: this is on the path of every call
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def exports_by_tracing() -> bool:
    """Whether torch.onnx.export traces this call (dynamo=False), whatever the module's backend is."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()


def interpreter_asked_for() -> bool:
    """Whether TRITON_INTERPRET is set, as triton interprets it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def kernels_are_interpreted() -> bool:
    """Whether the kernels run on the CPU: TRITON_INTERPRET is set, and was when triton was imported."""
    return interpreter_asked_for() and _triton_interprets()


@functools.cache
def _triton_interprets() -> bool:
    if why_no_triton():
        return False
    from triton.language import cdiv
    from triton.runtime import JITFunction

    return not isinstance(cdiv, JITFunction)  # triton itself reads the variable when it is imported


def product_precision(dtype: torch.dtype, device: torch.device) -> str:
    """tl.dot's input_precision. On NVIDIA GPUs float32 follows TRITON_LSTM_FP32, else the switch of cuDNN's RNNs:
    "tf32", or "tf32x3", three matmuls for almost float32 precision; "ieee" bypasses tensor cores.

    Raises ValueError for any other value of TRITON_LSTM_FP32.
    """
    if dtype != torch.float32 or device.type != "cuda" or torch.version.hip:
        return "ieee"
    if chosen := fp32_setting():
        return chosen
    # allow_tf32, which sets this one too, raises if convolutions and RNNs differ
    rnn: Any = torch.backends.cudnn.rnn
    return "tf32" if rnn.fp32_precision == "tf32" else "tf32x3"


def fp32_setting() -> str | None:
    """TRITON_LSTM_FP32, None if unset. Raises ValueError for an unknown value."""
    chosen = os.environ.get("TRITON_LSTM_FP32")
    if chosen and chosen not in ("tf32", "tf32x3", "ieee"):
        raise ValueError(f'TRITON_LSTM_FP32 must be "tf32", "tf32x3" or "ieee", got {chosen!r}')
    return chosen or None


def layer_dtype(dtype: torch.dtype, projected: bool) -> torch.dtype:
    """The dtype in which the kernels compute a layer: W_hh @ W_hr, which a projection needs, may overflow float16."""
    return torch.float32 if projected and dtype == torch.float16 else dtype


def precision_name(dtype: torch.dtype, device: torch.device) -> str:
    """The name in tables and benchmarks: bf16, fp16, tf32, fp32 or fp64."""
    if product_precision(dtype, device) == "tf32":
        return "tf32"
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}[dtype]


def autotune_setting() -> bool:
    """TRITON_LSTM_AUTOTUNE. Raises ValueError for any other value than 0 or 1."""
    chosen = os.environ.get("TRITON_LSTM_AUTOTUNE") or "0"
    if chosen not in ("0", "1"):
        raise ValueError(f"TRITON_LSTM_AUTOTUNE must be 0 or 1, got {chosen!r}")
    return chosen == "1"


def wants_tuning(device: torch.device) -> bool:
    """Whether a first call may tune: compiled on a GPU, if TRITON_LSTM_AUTOTUNE=1, not while a CUDA graph is captured.

    Raises ValueError as autotune_setting does.
    """
    if device.type != "cuda" or not autotune_setting() or interpreter_asked_for():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    return not torch.cuda.is_current_stream_capturing()


def spin_limit() -> int:
    """How often a program looks before it gives up: TRITON_LSTM_SPIN_LIMIT, or 0 for no limit."""
    text = os.environ.get("TRITON_LSTM_SPIN_LIMIT")
    if not text:
        return 0
    if not text.isascii() or not text.isdigit() or int(text) >= 1 << 31:
        raise ValueError(f"TRITON_LSTM_SPIN_LIMIT must be an integer from 0 to {(1 << 31) - 1}, got {text!r}")
    return int(text)


def tables_folder() -> str | None:
    """The value of TRITON_LSTM_TUNED; None if it is unset or empty."""
    return os.environ.get("TRITON_LSTM_TUNED") or None
