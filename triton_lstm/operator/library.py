"""A layer as operators of torch.library: opaque to torch.compile and torch.export, with any number of steps and rows.

An exported program that is loaded elsewhere needs them: `import triton_lstm.operator.library` first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

import triton_lstm.operator.torch_library  # noqa: F401  for programs that were exported where no kernel can run
from triton_lstm.kernels import accumulator
from triton_lstm.operator.arguments import DIFFERENTIABLE, Cotangents, LayerArguments, LayerResults
from triton_lstm.operator.layer import layer_backward, layer_forward, layer_gradients
from triton_lstm.operator.onnx_layer import layer_by_onnx, register

ARGUMENTS, COTANGENTS = len(LayerArguments._fields), len(Cotangents._fields)


def _schema(kind: Any) -> str:
    """The arguments of a NamedTuple as torch.library writes them."""
    return ", ".join(f"{'Tensor?' if 'None' in str(t) else 'Tensor'} {n}" for n, t in kind.__annotations__.items())


def layer(arguments: LayerArguments, *, save: bool, recompute: bool) -> LayerResults:
    """A layer; save: the gates and every c, for a backward pass."""
    results: LayerResults = _forward(*arguments, save and not recompute, save)
    return results


@custom_op("triton_lstm::fresh", mutates_args=(), schema="(Tensor tensor) -> Tensor")
def fresh(tensor: Tensor) -> Tensor:
    """A copy that no compiler removes: in-place changes of an output that is a view of a saved tensor would go
    unnoticed."""
    return tensor.clone()


@fresh.register_fake
def _clone(tensor: Tensor) -> Tensor:
    return tensor.clone()


fresh.register_autograd(lambda ctx, grad: grad)
register(torch.ops.triton_lstm.fresh.default, _clone)


@custom_op(
    "triton_lstm::layer_forward",
    mutates_args=(),
    schema=f"({_schema(LayerArguments)}, bool save_gates, bool save_c) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    """What is not saved comes back empty: an operator may not return None."""
    *arguments, save_gates, save_c = inputs
    x = arguments[0]
    with torch.autocast(x.device.type, enabled=False):
        y, h_n, c_n, gates, c = layer_forward(LayerArguments(*arguments), save_gates=save_gates, save_c=save_c)
    gates = x.new_empty(0) if gates is None else gates
    return y, h_n, c_n, gates, y.new_empty(0) if c is None else c


@_forward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    *tensors, save_gates, save_c = inputs
    arguments = LayerArguments(*tensors)
    x, (directions, batch, hidden_size) = arguments.x, arguments.sizes
    rows, width = x.shape[:-1], directions * hidden_size
    state = x.new_empty((directions, batch, hidden_size))
    c = x.new_empty((*rows, width), dtype=accumulator(x.dtype)) if save_c else x.new_empty(0)
    gates = x.new_empty((*rows, 4 * width)) if save_gates else x.new_empty(0)
    return x.new_empty((*rows, width)), state, torch.empty_like(state), gates, c


@custom_op(
    "triton_lstm::layer_backward",
    mutates_args=(),
    schema=f"({_schema(Cotangents)}, {_schema(LayerArguments)}, Tensor y, Tensor? gates, Tensor c) -> (Tensor, Tensor)",
)
def _backward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """dgates and dc0."""
    cotangents, arguments, saved = _parts(inputs)
    with torch.autocast(arguments.x.device.type, enabled=False):
        return layer_backward(cotangents, arguments, *saved)


def _parts(inputs: Any) -> tuple[Cotangents, LayerArguments, Any]:
    end = COTANGENTS + ARGUMENTS
    return Cotangents(*inputs[:COTANGENTS]), LayerArguments(*inputs[COTANGENTS:end]), inputs[end:]


@_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    _, arguments, (y, *_) = _parts(inputs)
    dc0 = arguments.x.new_empty(arguments.sizes)
    return arguments.x.new_empty((*y.shape[:-1], 4 * y.shape[-1])), dc0


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *arguments, save_gates, _ = inputs
    y, _, _, gates, c = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*arguments, y, gates if save_gates else None, c)


def _gradients(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    with torch.autocast(saved[0].device.type, enabled=False):  # what ran in one dtype forward runs in it backward
        dgates, dc0 = _backward(*cotangents, *saved)
        arguments, y, wanted = LayerArguments(*saved[:ARGUMENTS]), saved[ARGUMENTS], ctx.needs_input_grad
        gradients = layer_gradients(dgates, dc0, arguments, y, wanted=wanted[:DIFFERENTIABLE])
        return *gradients, *(None,) * (len(wanted) - DIFFERENTIABLE)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _to_onnx(*inputs: Any) -> tuple[Tensor, ...]:
    *arguments, save_gates, save_c = inputs
    results: Any = layer_by_onnx(LayerArguments(*arguments))
    y, h_n, c_n, gates, c = results
    c = c.to(accumulator(c.dtype)) if save_c else c.new_empty(0)
    return y, h_n, c_n, gates if save_gates else gates.new_empty(0), c


register(torch.ops.triton_lstm.layer_forward.default, _to_onnx)
