"""Which way a call goes: the kernels or PyTorch's own LSTM, and why. Asked once a call, before weights are laid out."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Sequence
from typing import Any

import torch

from triton_lstm.settings import chosen_backend, kernels_are_interpreted, precision_name, wants_gradient
from triton_lstm.system.installed import release, why_no_triton, why_not_imported
from triton_lstm.tuning.choice import layer_time

MARGIN = 0.05  # by which PyTorch's path must have been faster to be taken
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Reason(enum.Enum):
    """Why a call goes to PyTorch's own LSTM."""

    ASKED = "PyTorch's path was asked for"
    ONNX = "an ONNX file takes the standard operator"
    TRACED = "a kernel cannot be traced"
    SUBCLASS = "a kernel cannot be run on a {0}"
    NOT_IMPORTED = "{0}"
    NOT_INTERPRETED = "the input is on the CPU and TRITON_INTERPRET=1 was not set before triton was imported"
    NUMPY = "the interpreter of triton {0} needs NumPy < 2.4, this is {1}"
    DTYPE = "no kernel for {0}"
    DTYPE_ON_A_GPU = "no kernel for {0} on a GPU"
    DEVICE = "no kernel for {0} tensors"
    FASTER = "it was measured faster there: {0:.2f} us a step, {1:.2f} in the kernels"

    def why(self, *details: Any) -> Why:
        return Why(self, self.value.format(*details))


@dataclasses.dataclass(frozen=True)
class Why:
    """A reason, and the same in words."""

    reason: Reason
    text: str

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Route:
    """The way of a call: the kernels, or PyTorch's own LSTM, and then why."""

    kernels: bool
    why_torch: Why | None = None


KERNELS, TORCH_IN_A_GRAPH = Route(True), Route(False)  # the reason is known while the graph is made, and not kept


def decide(
    input: torch.Tensor,
    params: Sequence[torch.Tensor],
    hx: Sequence[torch.Tensor] | None,
    backend: str | None,
    *,
    batch: int,
    has_biases: bool,
    kernels_only: bool,
) -> Route:
    """The route of a call.

    Args:
        input, params, hx: the call's, as `lstm` takes them.
        backend: "auto", "triton", "torch", or None for the environment variable TRITON_LSTM_BACKEND ("auto" if unset).
        batch: rows of a step.
        kernels_only: the faster path is not looked up: for packed rows and calls that return states.

    Raises:
        ValueError: for another backend.
        RuntimeError: if backend="triton" and no kernel can run the call.
    """
    if torch.compiler.is_compiling():
        from triton_lstm.operator.compiled import constant

        kernels, refusal = constant(_while_compiling, input.device.type, input.dtype, backend)
        if refusal:
            raise RuntimeError(refusal)
        return KERNELS if kernels else TORCH_IN_A_GRAPH
    tracing = torch.jit.is_tracing()
    if tracing and torch.onnx.is_in_onnx_export():
        return Route(False, Reason.ONNX.why())
    chosen = chosen_backend(backend)
    why = _cannot_run_on((input, *params, *(hx or ())), tracing)
    if chosen == "torch":
        return Route(False, Reason.ASKED.why())
    why = why or no_kernel_for(input.device.type, input.dtype)
    if why is None and chosen == "auto" and not kernels_only:
        why = why_torch_is_faster(None, input, batch, params, has_biases, hx)
    return KERNELS if why is None else _allowed(why, chosen)


def decide_for(gpu: str, input: torch.Tensor, dtype: torch.dtype, backend: str | None, **measured: Any) -> Route:
    """The route of a call on a `gpu` that need not be here, by its name; dtype: what the call computes in. Packed rows
    and calls under autocast have nothing `measured`; the others the arguments of why_torch_is_faster.

    Raises as `decide` does.
    """
    chosen = chosen_backend(backend)
    if chosen == "torch":
        return Route(False, Reason.ASKED.why())
    why = None if input.dtype in _DTYPES else Reason.DTYPE_ON_A_GPU.why(input.dtype)
    if why is None and measured and dtype == input.dtype and chosen == "auto":
        why = why_torch_is_faster(gpu, input, **measured)
    return _allowed(why, chosen)


def _allowed(why: Why | None, chosen: str) -> Route:
    if why is None:
        return KERNELS
    if chosen == "triton":
        raise RuntimeError(_refusal(why))
    return Route(False, why)


def _refusal(why: Why) -> str:
    return f'backend="triton" cannot run this call: {why}. Use backend="auto" for PyTorch\'s path.'


def _while_compiling(device_type: str, dtype: torch.dtype, backend: str | None) -> tuple[bool, str | None]:
    """Whether the kernels are built into the graph, as is TRITON_LSTM_BACKEND, and an error if they cannot be.

    An ONNX file needs no kernel: there "triton" is "auto".
    """
    chosen = chosen_backend(backend)
    why = None if chosen == "torch" else no_kernel_for(device_type, dtype)
    if why is not None and chosen == "triton" and not torch.onnx.is_in_onnx_export():
        return False, _refusal(why)
    return chosen != "torch" and why is None, None


def why_torch_is_faster(
    gpu: str | None,
    input: torch.Tensor,
    batch: int,
    params: Sequence[torch.Tensor],
    has_biases: bool,
    hx: Sequence[torch.Tensor] | None = None,
) -> Why | None:
    """Why a call that the kernels could run goes to PyTorch's LSTM nevertheless: a tuned table has measured it to be
    faster there. None unless that is known and both are equivalent: one layer and direction, as measured, and no
    gradient, since cuDNN has none in eval mode and no second one.

    gpu: the name of the GPU, None for the input's own. params: as `lstm` takes them.
    """
    if (gpu is None and input.device.type != "cuda") or len(params) != (4 if has_biases else 2):
        return None
    if torch.is_autocast_enabled("cuda") or torch._C._are_functorch_transforms_active():
        return None
    if wants_gradient(input, *params, *(hx or ())):
        return None
    device = torch.device("cuda") if gpu else input.device
    name, hidden_size = gpu or torch.cuda.get_device_name(input.device), params[1].shape[1]
    time = layer_time(name, "inference", precision_name(input.dtype, device), hidden_size, batch)
    if time is None or time.torch_us > (1 - MARGIN) * time.triton_us:
        return None
    return Reason.FASTER.why(time.torch_us, time.triton_us)


def _cannot_run_on(tensors: Sequence[torch.Tensor], tracing: bool) -> Why | None:
    if tracing or (torch._C._len_torch_dispatch_stack() and _in_fake_mode()):
        return Reason.TRACED.why()
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            if type(tensor).__name__ == "ExpandedWeight":
                raise RuntimeError(
                    "ExpandedWeights give gradients of each sample of PyTorch's own classes only, not of "
                    "triton_lstm.LSTM: use torch.func's vmap and grad"
                )
            return Reason.SUBCLASS.why(type(tensor).__name__)
    return None


def _in_fake_mode() -> bool:
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return any(type(m).__name__ in ("FakeTensorMode", "ProxyTorchDispatchMode") for m in modes)


def has_no_values(tensor: torch.Tensor) -> bool:
    """Whether a call must not depend on tensors' values, which are unknown or would become part of a trace."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return torch.jit.is_tracing() or tensor.is_meta or _in_fake_mode()


def why_torch(dtype: torch.dtype, device: torch.device, backend: str | None) -> Why | None:
    """Why all calls on such tensors go to PyTorch's own LSTM; None: the kernels take them. Raises as `decide` does."""
    input = torch.zeros(0, dtype=dtype, device=device)
    return decide(input, (), None, backend, batch=0, has_biases=True, kernels_only=True).why_torch


def no_kernel_for(device_type: str, dtype: torch.dtype) -> Why | None:
    """Why the kernels cannot take such tensors; None if they can."""
    return _no_kernel_for(device_type, dtype, device_type == "cpu" and kernels_are_interpreted())


@functools.cache
def _no_kernel_for(device_type: str, dtype: torch.dtype, interpreted: bool) -> Why | None:
    reason = why_no_triton() or why_not_imported("numpy", "__version__")
    if reason:
        return Reason.NOT_IMPORTED.why(reason)
    if device_type == "cpu":
        import numpy
        import triton

        if not interpreted:
            return Reason.NOT_INTERPRETED.why()
        if release(triton.__version__) < (3, 7) and release(numpy.__version__) >= (2, 4):
            return Reason.NUMPY.why(triton.__version__, numpy.__version__)
        if dtype not in (*_DTYPES, torch.float64):
            return Reason.DTYPE.why(dtype)
    elif device_type != "cuda":
        return Reason.DEVICE.why(device_type)
    elif dtype not in _DTYPES:
        return Reason.DTYPE_ON_A_GPU.why(dtype)
    reason = why_not_imported("triton_lstm.operator.autograd")
    return None if reason is None else Reason.NOT_IMPORTED.why(reason)
