"""A layer as operators of torch.library: opaque to torch.compile and torch.export, with any number of steps and rows.

An exported program that is loaded elsewhere needs them: `import triton_lstm.ops` first.
No `from __future__ import annotations`: the operators' schemas are read off these annotations.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from triton_lstm.kernels import accumulator
from triton_lstm.layer import layer_backward, layer_forward, layer_gradients
from triton_lstm.onnx_layer import layer_by_onnx, register


def layer(*arguments: Tensor | None, save: bool, recompute: bool) -> tuple[Tensor, ...]:
    """A layer's arguments -> its results (see layer.py); save: for a backward pass."""
    return _forward(*arguments, save and not recompute, save)


@custom_op("triton_lstm::fresh", mutates_args=())
def fresh(tensor: Tensor) -> Tensor:
    """A copy that no compiler takes out: an output that is a view of what a backward pass reads could be changed in
    place without anybody's noticing."""
    return tensor.clone()


@fresh.register_fake
def _clone(tensor: Tensor) -> Tensor:
    return tensor.clone()


fresh.register_autograd(lambda ctx, grad: grad)
register(torch.ops.triton_lstm.fresh.default, _clone)


@custom_op("triton_lstm::layer_forward", mutates_args=())
def _forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    biases: Tensor | None,
    r0: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    save_gates: bool,
    save_c: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What is not saved comes back empty: an operator may not return None."""
    with torch.autocast(x.device.type, enabled=False):
        y, h_n, c_n, gates, c = layer_forward(
            x, h0, c0, w_ih, w_hh, biases, r0, starts, lengths, save_gates=save_gates, save_c=save_c
        )
    gates = x.new_empty(0) if gates is None else gates
    return y, h_n, c_n, gates, c0.new_empty(0) if c is None else c


@_forward.register_fake
def _(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    biases: Tensor | None,
    r0: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    save_gates: bool,
    save_c: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, width, (directions, _, hidden_size) = x.shape[:-1], c0.shape[-1], w_hh.shape
    state = x.new_empty((directions, c0.shape[0], hidden_size))
    c = c0.new_empty((*rows, width), dtype=accumulator(x.dtype)) if save_c else c0.new_empty(0)
    gates = x.new_empty((*rows, 4 * width)) if save_gates else x.new_empty(0)
    return x.new_empty((*rows, width)), state, torch.empty_like(state), gates, c


@custom_op("triton_lstm::layer_backward", mutates_args=())
def _backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dact: Tensor | None,
    dc_all: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    biases: Tensor | None,
    r0: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    y: Tensor,
    gates: Tensor | None,
    c: Tensor,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return layer_backward(
            dy, dh_n, dc_n, dact, dc_all, x, h0, c0, w_ih, w_hh, biases, r0, starts, lengths, y, gates, c
        )


@_backward.register_fake
def _(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dact: Tensor | None,
    dc_all: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    biases: Tensor | None,
    r0: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    y: Tensor,
    gates: Tensor | None,
    c: Tensor,
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*y.shape[:-1], 4 * y.shape[-1])), c0.new_empty(c0.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *arguments, save_gates, _ = inputs
    y, _, _, gates, c = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*arguments, y, gates if save_gates else None, c)


def _gradients(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    with torch.autocast(saved[0].device.type, enabled=False):  # what ran in one dtype forward runs in it backward
        dgates, dc0 = _backward(*cotangents, *saved)
        return *layer_gradients(dgates, dc0, *saved[:10], wanted=ctx.needs_input_grad[:7]), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _to_onnx(*inputs: Any) -> tuple[Tensor, ...]:
    *arguments, save_gates, save_c = inputs
    y, h_n, c_n, gates, c = layer_by_onnx(*arguments)
    c = c.to(accumulator(c.dtype)) if save_c else c.new_empty(0)
    return y, h_n, c_n, gates if save_gates else gates.new_empty(0), c


register(torch.ops.triton_lstm.layer_forward.default, _to_onnx)
