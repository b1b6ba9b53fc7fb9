"""One LSTM layer under autograd: LSTMFunction runs the kernels, LSTMBackward makes double backward right."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from triton_lstm.core.packing import batch_sizes_of
from triton_lstm.kernels import accumulator
from triton_lstm.operator.arguments import DIFFERENTIABLE, Cotangents, LayerArguments, LayerResults
from triton_lstm.operator.hooks import Hooks, Totals, active, refuse_batched
from triton_lstm.operator.layer import layer_backward, layer_forward, layer_gradients
from triton_lstm.operator.torch_layer import all_preactivations, layer_by_torch, loop_by_torch
from triton_lstm.operator.vmap import backward_rule, forward_rule
from triton_lstm.settings import wants_gradient

Tensor = torch.Tensor
ARGUMENTS, COTANGENTS = len(LayerArguments._fields), len(Cotangents._fields)
DIFFERENTIATED_TWICE = COTANGENTS + ARGUMENTS  # inputs of LSTMBackward; the others only repeat what they determine


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, skipped by the compiler, which sees what torch.func or autograd call out of a frame that it could not
    compile: an autograd.Function traced under torch.func has zeros for gradients."""

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        transformed = torch._C._are_functorch_transforms_active() and "torch._dynamo" in sys.modules
        if transformed or torch.compiler.is_compiling():
            from triton_lstm.operator.compiled import eagerly

            return eagerly(function, *args)
        return function(*args)

    return wrapper


def _without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """What ran in one dtype forward runs in it backward, wherever `backward` is called."""

    @functools.wraps(backward)
    def wrapper(ctx: Any, *cotangents: Tensor | None) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return backward(ctx, *cotangents)
        kind = next((t.device.type for t in cotangents if t is not None), "cpu")
        with torch.autocast(kind, enabled=False):
            return backward(ctx, *cotangents)

    return wrapper


@_untraced
def _apply(*inputs: Any) -> LayerResults:
    results: LayerResults = TransformedLSTMFunction.apply(*inputs)
    return results


def layer(arguments: LayerArguments, *, recompute: bool, states: bool, hooks: Hooks = ()) -> LayerResults:
    """A layer; with the gates and every c if a backward pass may follow, or if `states` is set.

    recompute: the backward pass recomputes the gates, unless `states` is set. hooks: called after every backward pass.
    """
    recompute = recompute and not states
    # Under forward-mode AD apply() raises; a plain call would silently have no derivative
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    if transformed:
        return _apply(*arguments, recompute, None)
    differentiable = wants_gradient(*arguments)
    if torch.compiler.is_compiling():
        from triton_lstm.operator import library

        return library.layer(arguments, recompute=recompute, save=states or differentiable)
    if differentiable:
        results: LayerResults = LSTMFunction.apply(*arguments, recompute, hooks)
        return results
    return layer_forward(arguments, save_gates=states, save_c=states)


def _forward(inputs: Sequence[Any]) -> LayerResults:
    *arguments, recompute, _ = inputs
    return layer_forward(LayerArguments(*arguments), save_gates=not recompute, save_c=True)


def _setup_context(ctx: Any, inputs: Sequence[Any], results: LayerResults, transformed: bool) -> None:
    *arguments, _, ctx.hooks = inputs
    ctx.transformed = transformed
    y, _, _, gates, c = results
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*arguments, y, gates, c)


class LSTMFunction(torch.autograd.Function):
    """(a layer's arguments, recompute, hooks) -> its results, without the gates if `recompute`.

    Without setup_context, with which a call would make three times as many function calls.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        results = _forward(inputs)
        _setup_context(ctx, inputs, results, transformed=False)
        return results

    @staticmethod
    @_untraced
    @_without_autocast
    def backward(ctx: Any, *cotangents: Any) -> Any:
        nothing = (None,) * (ARGUMENTS - DIFFERENTIABLE + 2)
        given = [cotangent for cotangent in cotangents if cotangent is not None]
        if not given:  # in a double backward
            return *(None,) * DIFFERENTIABLE, *nothing
        saved = ctx.saved_tensors  # once: checkpointing unpacks every tensor a single time
        arguments = LayerArguments(*saved[:ARGUMENTS])
        y, gates, c = saved[ARGUMENTS:]
        hooks = active(ctx.hooks) if ctx.hooks else ()
        for cotangent in given:
            if torch._C._functorch.is_legacy_batchedtensor(cotangent):
                if hooks:
                    refuse_batched(cotangents)
                return *_gradients_by_torch(arguments, cotangents, ctx.needs_input_grad), *nothing
        totals = Totals(any(hook.every_element for hook in hooks)) if hooks else None
        # Wrapped tensors reach the kernels through a Function only, whatever the grad mode is
        transformed = ctx.transformed or torch._C._are_functorch_transforms_active()
        if transformed or torch.is_grad_enabled():
            dgates, dc0 = LSTMBackward.apply(*cotangents, *saved, totals)
        else:
            dgates, dc0 = layer_backward(Cotangents(*cotangents), arguments, y, gates, c, totals)
        wanted = ctx.needs_input_grad[:DIFFERENTIABLE]
        gradients = layer_gradients(dgates, dc0, arguments, y, wanted=wanted)
        for hook in hooks:
            assert totals is not None
            hook.after_backward(cotangents, dgates, dc0, gradients[0], arguments, y, totals)
        return *gradients, *nothing


class TransformedLSTMFunction(LSTMFunction):
    """LSTMFunction for torch.func and forward-mode AD."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return _forward(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _setup_context(ctx, inputs, output, transformed=True)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "the kernels of triton_lstm have no forward derivative (jvp, jacfwd). Take a reverse one (vjp, jacrev), or "
            'backend="torch" in float64 on the CPU, which has it.'
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return forward_rule(TransformedLSTMFunction.apply, info, in_dims, *inputs)


class LSTMBackward(torch.autograd.Function):
    """(cotangents, a layer's arguments, y, the gates, every c, totals) -> (dgates, dc0).

    Its own backward differentiates loop_by_torch twice, so that a double backward is right; y, gates and c, which
    only repeat what the arguments determine, get no gradient of their own.
    """

    @staticmethod
    def forward(*inputs: Any) -> Any:
        cotangents, arguments = inputs[:COTANGENTS], inputs[COTANGENTS:DIFFERENTIATED_TWICE]
        return layer_backward(Cotangents(*cotangents), LayerArguments(*arguments), *inputs[DIFFERENTIATED_TWICE:])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:DIFFERENTIATED_TWICE])

    @staticmethod
    @_untraced
    @_without_autocast
    def backward(ctx: Any, *cotangents: Any) -> Any:
        saved = ctx.saved_tensors
        return *_differentiate_twice(saved, cotangents), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return backward_rule(LSTMBackward.apply, info, in_dims, *arguments)


def _gradients_by_torch(arguments: LayerArguments, cotangents: tuple[Any, ...], wanted: tuple[bool, ...]) -> list[Any]:
    """Gradients of a layer's arguments in plain torch: for autograd.grad(is_grads_batched=True), whose
    cotangents neither a kernel nor a vmap rule can handle."""
    tensors = arguments[:DIFFERENTIABLE]
    again = torch.is_grad_enabled()  # under create_graph: the gradients have a history of their own
    asked = [i for i in range(len(tensors)) if wanted[i]]
    with torch.enable_grad():
        leaves: list[Any] = [None if t is None else t.view_as(t) if again else t.detach() for t in tensors]
        for i in asked:
            if not leaves[i].requires_grad:
                leaves[i].requires_grad_()
        wide: list[Any] = [None if t is None else t.to(accumulator(t.dtype)) for t in leaves]
        outputs: Any = layer_by_torch(LayerArguments(*wide, *arguments[DIFFERENTIABLE:]))
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
    """Gradients of LSTMBackward's cotangents and arguments, given `cotangents` of dgates and dc0."""
    *tensors, starts, lengths, resets = saved
    result: list[Any] = [None] * len(saved)
    if all(cotangent is None for cotangent in cotangents):
        return result
    present = [i for i, t in enumerate(tensors) if t is not None]
    batch_sizes = batch_sizes_of(starts)

    def gradients(*values: Tensor) -> tuple[Tensor, ...]:
        wide: list[Any] = [None] * len(tensors)
        for i, t in zip(present, values, strict=True):
            wide[i] = t.to(accumulator(t.dtype))
        arguments = LayerArguments(*[*wide[COTANGENTS:], starts, lengths, resets])
        _, h0, c0, _, w_hh, *_ = arguments
        xg = all_preactivations(arguments)
        zeros = xg.new_zeros(arguments.sizes)
        h0, c0 = (zeros if state is None else state for state in (h0, c0))

        def loop(xg: Tensor, c0: Tensor) -> tuple[Tensor, ...]:
            return loop_by_torch(xg, h0, c0, w_hh, batch_sizes, resets)

        outputs, pull_back, *_ = torch.func.vjp(loop, xg, c0)
        dual = zip(outputs, wide[:COTANGENTS], strict=True)
        return pull_back(tuple(torch.zeros_like(out) if d is None else d for out, d in dual))

    outputs, pull_back, *_ = torch.func.vjp(gradients, *(tensors[i] for i in present))
    dual = zip(outputs, cotangents, strict=True)
    second = pull_back(tuple(torch.zeros_like(out) if d is None else d.to(out.dtype) for out, d in dual))
    for i, grad in zip(present, second, strict=True):
        result[i] = grad
    return result
