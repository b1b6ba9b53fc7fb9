"""One LSTM layer under autograd: LSTMFunction runs the kernels, LSTMBackward makes double backward right.

A layer's arguments and results are those of layer.py.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from triton_lstm.backend import wants_gradient
from triton_lstm.kernels import accumulator
from triton_lstm.layer import Totals, layer_backward, layer_forward, layer_gradients
from triton_lstm.packing import batch_sizes_of
from triton_lstm.record import Taps, hear, listening, refuse_batched
from triton_lstm.torch_layer import layer_by_torch, loop_by_torch, preactivations
from triton_lstm.vmap import backward_rule, forward_rule

Tensor = torch.Tensor


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, left alone by the compiler, which sees what torch.func or autograd call out of a frame that it could
    not compile: an autograd.Function traced under torch.func has zeros for gradients."""

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        transformed = torch._C._are_functorch_transforms_active() and "torch._dynamo" in sys.modules
        if transformed or torch.compiler.is_compiling():
            from triton_lstm.compiled import eagerly

            return eagerly(function, *args)
        return function(*args)

    return wrapper


@_untraced
def _apply(*inputs: Any) -> tuple[Any, ...]:
    return LSTMFunction.apply(*inputs)


def layer(*arguments: Any, recompute: bool, states: bool, taps: Taps = ()) -> tuple[Any, ...]:
    """A layer's arguments -> its results; the gates and c where a gradient can be asked for, or if `states` are wanted.

    recompute: the gates are made again in the backward pass, unless they are wanted anyway. taps: hear every backward
    pass.
    """
    recompute = recompute and not states
    tensors = [t for t in arguments if t is not None]
    # Under forward-mode AD apply() says that there is no such derivative; a plain call would silently have none
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    if torch.compiler.is_compiling() and not transformed:
        from triton_lstm import ops

        return ops.layer(*arguments, recompute=recompute, save=states or wants_gradient(*tensors))
    if transformed:
        return _apply(*arguments, recompute, None)
    if wants_gradient(*tensors):
        return LSTMFunction.apply(*arguments, recompute, taps or None)
    return layer_forward(*arguments, save_gates=states, save_c=states)


class LSTMFunction(torch.autograd.Function):
    """(a layer's arguments, recompute, taps) -> its results; the gates are None with `recompute`, made again later."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        *arguments, recompute, _ = inputs
        return layer_forward(*arguments, save_gates=not recompute, save_c=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *arguments, _, ctx.taps = inputs
        y, _, _, gates, c_all = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments, y, gates, c_all)

    @staticmethod
    @_untraced
    def backward(ctx: Any, *cotangents: Any) -> Any:
        if all(cotangent is None for cotangent in cotangents):  # a double backward comes by without any
            return (None,) * 11
        saved = ctx.saved_tensors  # once: checkpointing unpacks every tensor a single time
        with _without_autocast(saved[0]):
            taps = listening(ctx.taps or ())
            if any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in cotangents):
                if taps:
                    refuse_batched(cotangents)
                return *_gradients_by_torch(saved[:9], cotangents, ctx.needs_input_grad), None, None, None, None
            totals = Totals(any(tap.every_element for tap in taps)) if taps else None
            dgates, dc0 = LSTMBackward.apply(*cotangents, *saved, totals)
            gradients = layer_gradients(dgates, dc0, *saved[:10], wanted=ctx.needs_input_grad[:7])
            if totals:
                hear(taps, cotangents, dgates, dc0, gradients[0], saved, totals)
            return *gradients, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "the kernels of triton_lstm have no forward derivative (jvp, jacfwd). Take a reverse one (vjp, jacrev), or "
            'backend="torch" in float64 on the CPU, which has it.'
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return forward_rule(LSTMFunction.apply, info, in_dims, *inputs)


class LSTMBackward(torch.autograd.Function):
    """(dy, dh_n, dc_n, the gates' and every c's gradients, all that LSTMFunction saved, totals) -> (dgates, dc0).

    Its own backward differentiates loop_by_torch twice, so that a double backward is right; y, gates and c, which
    only repeat what the arguments determine, get no gradient of their own.
    """

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return layer_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:14])

    @staticmethod
    @_untraced
    def backward(ctx: Any, *cotangents: Any) -> Any:
        saved = ctx.saved_tensors
        with _without_autocast(saved[5]):
            return *_differentiate_twice(saved, cotangents), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return backward_rule(LSTMBackward.apply, info, in_dims, *arguments)


def _gradients_by_torch(arguments: tuple[Any, ...], cotangents: tuple[Any, ...], wanted: tuple[bool, ...]) -> list[Any]:
    """Gradients of a layer's first seven arguments in plain torch: for autograd.grad(is_grads_batched=True), whose
    cotangents no kernel can read and no vmap rule is told of."""
    tensors = arguments[:7]
    again = torch.is_grad_enabled()  # under create_graph: the gradients have a history of their own
    asked = [i for i in range(len(tensors)) if wanted[i]]
    with torch.enable_grad():
        leaves: list[Any] = [None if t is None else t.view_as(t) if again else t.detach() for t in tensors]
        for i in asked:
            if not leaves[i].requires_grad:
                leaves[i].requires_grad_()
        wide: list[Any] = [None if t is None else t.to(accumulator(t.dtype)) for t in leaves]
        outputs = layer_by_torch(*wide, *arguments[7:])
    given = [k for k, cotangent in enumerate(cotangents) if cotangent is not None]
    grads = torch.autograd.grad(
        [outputs[k] for k in given],
        [leaves[i] for i in asked],
        [cotangents[k].to(outputs[k].dtype) for k in given],
        allow_unused=True,
        create_graph=again,
    )
    result: list[Any] = [None] * len(tensors)
    for i, grad in zip(asked, grads, strict=True):
        result[i] = grad
    return result


def _differentiate_twice(saved: tuple[Any, ...], cotangents: tuple[Any, ...]) -> list[Any]:
    """Gradients of LSTMBackward's first fourteen arguments, given `cotangents` of dgates and dc0."""
    *tensors, starts, lengths = saved
    result: list[Any] = [None] * len(saved)
    if all(cotangent is None for cotangent in cotangents):
        return result
    present = [i for i, t in enumerate(tensors) if t is not None]
    batch_sizes = batch_sizes_of(starts)

    def gradients(*values: Tensor) -> tuple[Tensor, ...]:
        wide: list[Any] = [None] * len(tensors)
        for i, t in zip(present, values, strict=True):
            wide[i] = t.to(accumulator(t.dtype))
        x, h0, c0, w_ih, w_hh, biases, r0 = wide[5:]
        xg = preactivations(x, w_ih, biases, r0, starts, lengths)
        h0 = torch.zeros_like(c0) if h0 is None else h0
        outputs, pull_back, *_ = torch.func.vjp(lambda xg, c0: loop_by_torch(xg, h0, c0, w_hh, batch_sizes), xg, c0)
        dual = zip(outputs, wide[:5], strict=True)
        return pull_back(tuple(torch.zeros_like(out) if d is None else d for out, d in dual))

    outputs, pull_back, *_ = torch.func.vjp(gradients, *(tensors[i] for i in present))
    dual = zip(outputs, cotangents, strict=True)
    second = pull_back(tuple(torch.zeros_like(out) if d is None else d.to(out.dtype) for out, d in dual))
    for i, grad in zip(present, second, strict=True):
        result[i] = grad
    return result


def _without_autocast(tensor: Tensor) -> torch.autocast:
    """What ran in one dtype forward runs in it backward, wherever `backward` is called."""
    return torch.autocast(tensor.device.type, enabled=False)
