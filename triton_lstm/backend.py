"""Which way a call goes, kernels or PyTorch's own LSTM, in which precision; what switches and the environment say."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, Literal

import torch

Backend = Literal["auto", "triton", "torch"]
OLDEST_TRITON = (3, 5)
MARGIN = 0.05  # by which PyTorch's path must have been faster to be taken
_importing = threading.RLock()
if hasattr(os, "register_at_fork"):  # a fork waits for an import, whose thread its child would wait for for ever
    os.register_at_fork(
        before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_importing.release
    )
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
    if exports_by_tracing():
        return "an ONNX file takes the standard operator"
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


def exports_by_tracing() -> bool:
    """Whether torch.onnx.export traces this call (dynamo=False), whatever backend the module has for its own calls."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()


def _cannot_run_on(*tensors: torch.Tensor) -> str | None:
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    if torch.jit.is_tracing() or any(type(m).__name__ in ("FakeTensorMode", "ProxyTorchDispatchMode") for m in modes):
        return "a kernel cannot be traced"
    kinds = (type(t) for t in tensors if type(t) not in (torch.Tensor, torch.nn.Parameter))
    kind = next(kinds, None)
    if kind is not None and kind.__name__ == "ExpandedWeight":
        raise RuntimeError(
            "ExpandedWeights give gradients of each sample of PyTorch's own classes only, not of triton_lstm.LSTM: use "
            "torch.func's vmap and grad"
        )
    return None if kind is None else f"a kernel cannot be run on a {kind.__name__}"


def no_kernel_for(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take such tensors, in words."""
    reason = why_no_triton() or why_not_imported("numpy", "__version__")
    if reason:
        return reason
    if device_type == "cpu":
        import numpy
        import triton

        if not _interpreting():
            return "the input is on the CPU and TRITON_INTERPRET=1 was not set before triton was imported"
        if release(triton.__version__) < (3, 7) and release(numpy.__version__) >= (2, 4):
            return f"the interpreter of triton {triton.__version__} needs NumPy < 2.4, this is {numpy.__version__}"
        reason = None if dtype in (*_DTYPES, torch.float64) else f"no kernel for {dtype}"
    elif device_type != "cuda":
        reason = f"no kernel for {device_type} tensors"
    elif dtype not in _DTYPES:
        reason = f"no kernel for {dtype} on a GPU"
    return reason or why_not_imported("triton_lstm.autograd")


def why_no_triton() -> str | None:
    """Why there is no triton to work with, in words: none, an old or broken one, something else of its name."""
    for module, name in (("triton", "__version__"), ("triton.language", "cdiv"), ("triton.runtime", "JITFunction")):
        if reason := why_not_imported(module, name):
            return reason
    import triton

    if release(triton.__version__) < OLDEST_TRITON:
        return f"triton {triton.__version__} is too old: 3.5 or newer is needed"
    return None


@functools.cache
def why_not_imported(module: str, *names: str) -> str | None:
    """Why a module cannot be imported, or lacks one of `names`, in words.

    A failure is final: what half an import has left is not to be trusted. Only one that a signal ended is tried again.
    """
    package = module.partition(".")[0]
    try:
        with _importing:
            if package == "triton" and package not in sys.modules:  # Ctrl-C has left parts that know another whole
                for name in [n for n in sys.modules if n.startswith("triton.") and not n.startswith("triton._C")]:
                    del sys.modules[name]
            found = importlib.import_module(module)
        for name in names:
            getattr(found, name)
    except BaseException as error:  # a module may raise anything, also what is to end the process
        if signalled := _from_a_signal(error):
            raise signalled from None
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            return f"{package} is not installed"
        try:
            lines = str(error).splitlines() or ["no message"]
        except Exception:
            lines = ["a message that cannot be read"]
        what = f"the kernels with triton{_place('triton')}" if names == () else package + _place(package)
        return f"{what} cannot be used: {type(error).__name__}: {lines[0]}"
    return None


def _from_a_signal(error: BaseException | None) -> BaseException | None:
    """`error` or a cause of it, if Ctrl-C or a signal's handler raised it: it is no matter of the module.

    Python makes RuntimeError of what a descriptor raises in its making, and pybind11 ImportError.
    """
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    while error is not None:
        frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
        if isinstance(error, KeyboardInterrupt) or not handlers.isdisjoint(frames):
            return error
        error = error.__cause__
    return None


def _code(handler: Any) -> Any:
    """Of a function, a method, a partial one or an object that can be called; None of what Python has none for."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    if not callable(handler):  # signal.SIG_DFL, whose class can be called
        return None
    return getattr(handler, "__code__", None) or getattr(type(handler).__call__, "__code__", None)


def _place(package: str) -> str:
    """Where a package lies, which tells a stranger of the same name; nothing where that cannot be told."""
    try:
        spec = importlib.util.find_spec(package)
    except Exception:
        return ""
    places = [] if spec is None else [spec.origin] if spec.has_location else list(spec.submodule_search_locations or [])
    return f" in {places[0]}" if places else ""


def release(version: object) -> tuple[int, ...]:
    """The first two numbers of a version; what stands there without a number counts as 0."""
    return _release(str(version))


@functools.cache
def _release(version: str) -> tuple[int, ...]:
    return tuple(int((re.match(r"\d{1,9}", part) or ["0"])[0]) for part in version.split(".")[:2])


def interpreter_asked_for() -> bool:
    """Whether TRITON_INTERPRET is set, as triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _interpreting() -> bool:
    if not interpreter_asked_for():
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


def layer_dtype(dtype: torch.dtype, projected: bool) -> torch.dtype:
    """What a layer computes in on the kernels: W_hh @ W_hr, which a projection needs, may be larger than float16."""
    return torch.float32 if projected and dtype == torch.float16 else dtype


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
    if chosen == "0" or device.type != "cuda" or interpreter_asked_for():
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
