"""PyTorch's own LSTM as an operator of torch.library, for graphs where no kernel can run.

No `from __future__ import annotations`: the operators' schemas are read off these annotations.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from triton_lstm.core.checks import by_layer
from triton_lstm.core.segments import Segments, refuse_in_onnx, segments_of
from triton_lstm.operator.onnx_layer import layer_by_onnx, register
from triton_lstm.operator.projection import one_layer
from triton_lstm.operator.torch_path import lstm_of_segments


def lstm_by_torch(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.lstm, opaque: traced it unrolls over time, and on the CPU its training breaks."""
    kind = "cpu" if input.device.type == "meta" else input.device.type  # autocast has no meta device
    if torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        input, hx, params = input.to(dtype), [state.to(dtype) for state in hx], [param.to(dtype) for param in params]
    x = input.transpose(0, 1) if batch_first else input
    size, directions = len(params) // num_layers, 2 if bidirectional else 1
    results = []
    for k in range(num_layers):
        if train and dropout and k:
            x = torch.nn.functional.dropout(x, dropout, True)
        h0, c0 = (state[k * directions : (k + 1) * directions] for state in hx)
        of_layer = list(params[k * size : (k + 1) * size])
        results.append(_torch_layer(x, h0, c0, of_layer, has_biases, bidirectional, resets))
        x = results[-1][0]
    if batch_first:
        x = x.transpose(0, 1)
    return x, torch.cat([h_n for _, h_n, _ in results]), torch.cat([c_n for _, _, c_n in results])


def _one_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    bidirectional: bool,
    segments: Segments | None,
) -> tuple[Tensor, ...]:
    options = has_biases, 1, 0.0, True, bidirectional
    if segments is None:
        lstm: Any = torch.lstm
        results: tuple[Tensor, ...] = lstm(x, [h0, c0], params, *options, False)
        return results
    return lstm_of_segments(x, [h0, c0], params, options, segments)


def _segments(resets: Tensor | None) -> Segments | None:
    return None if resets is None else segments_of(resets, None, resets.device)


@custom_op("triton_lstm::torch_layer", mutates_args=())
def _torch_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    params: list[Tensor],
    has_biases: bool,
    bidirectional: bool,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        y, h_n, c_n = _one_layer(x, h0, c0, params, has_biases, bidirectional, _segments(resets))
    return y.contiguous(), h_n.contiguous(), c_n.contiguous()


@_torch_layer.register_fake
def _(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    params: list[Tensor],
    has_biases: bool,
    bidirectional: bool,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], h0.shape[0] * h0.shape[2])), x.new_empty(h0.shape), x.new_empty(c0.shape)


@custom_op("triton_lstm::torch_layer_backward", mutates_args=())
def _torch_layer_backward(
    cotangents: list[Tensor],
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    params: list[Tensor],
    has_biases: bool,
    bidirectional: bool,
    resets: Tensor | None,
) -> list[Tensor]:
    """Gradients of x, h0, c0 and the params; runs the layer again, whose graph no operator can keep."""
    # Not by torch.func, which has neither cuDNN's LSTM nor a packed one
    with torch.autocast(x.device.type, enabled=False), torch.enable_grad(), _autograd():
        x, h0, c0, *params = leaves = [tensor.detach().requires_grad_() for tensor in (x, h0, c0, *params)]
        results = _one_layer(x, h0, c0, params, has_biases, bidirectional, _segments(resets))
        grads = torch.autograd.grad(results, leaves, cotangents, materialize_grads=True)
        return [grad.clone(memory_format=torch.contiguous_format) for grad in grads]


def _autograd() -> Any:
    """A context in which autograd is on inside an operator."""
    off = torch._C._dispatch_tls_local_exclude_set()
    on = off.remove(torch._C.DispatchKey.AutogradFunctionality)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), on)


@_torch_layer_backward.register_fake
def _(
    cotangents: list[Tensor],
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    params: list[Tensor],
    has_biases: bool,
    bidirectional: bool,
    resets: Tensor | None,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (x, h0, c0, *params)]


def _setup_torch_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, h0, c0, params, ctx.has_biases, ctx.bidirectional, resets = inputs
    ctx.save_for_backward(x, h0, c0, resets, *params)


def _torch_gradients(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    x, h0, c0, resets, *params = ctx.saved_tensors
    grads = _torch_layer_backward(list(cotangents), x, h0, c0, params, ctx.has_biases, ctx.bidirectional, resets)
    return *grads[:3], grads[3:], None, None, None


_torch_layer.register_autograd(_torch_gradients, setup_context=_setup_torch_context)


def _to_onnx(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    params: list[Tensor],
    has_biases: bool,
    bidirectional: bool,
    resets: Tensor | None,
) -> tuple[Tensor, ...]:
    refuse_in_onnx(resets)
    groups = by_layer(params, len(h0), has_biases)
    return one_layer(layer_by_onnx, x, h0, c0, groups, None, None)[:3]


register(torch.ops.triton_lstm.torch_layer.default, _to_onnx)
