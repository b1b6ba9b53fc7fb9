"""One LSTM layer and direction under autograd: LSTMFunction runs the kernels, LSTMBackward makes double backward right.

r0, here and below, is what a projected layer adds to the pre-activations of its first step (see functional.py).
"""

from __future__ import annotations

from typing import Any

import torch

from triton_lstm.backend import precision_name, wants_gradient, wants_tuning
from triton_lstm.kernels import (
    accumulator,
    device_facts,
    lstm_backward,
    lstm_forward,
)
from triton_lstm.plan import Plan
from triton_lstm.reference import lstm_reference
from triton_lstm.table_file import Key
from triton_lstm.tables import Choice, choose

Tensors = tuple[torch.Tensor | None, ...]


def plan_for(gates: torch.Tensor, *, backward: bool) -> Plan:
    """The plan for the time loop over `gates` (T, B, 4H)."""
    return choice_for(gates.dtype, gates.device, gates.shape[1], gates.shape[2] // 4, backward).plan


def choice_for(dtype: torch.dtype, device: torch.device, batch: int, hidden_size: int, backward: bool) -> Choice:
    """The plan for a layer of this dtype and size, and where it is from; measured first if the user wants that."""
    key = Key(backward, precision_name(dtype, device), hidden_size, batch)
    choice = choose(device_facts(device), key)
    if batch and wants_tuning(device) and not choice.exactly(key):
        from triton_lstm.tune import tune_now

        tune_now(key, device)
        choice = choose(device_facts(device), key)
    return choice


@torch.compiler.disable  # a graph break: the kernels are not registered as operators yet
def layer(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LSTMFunction's inputs -> y, h_n, c_n; saves nothing where no gradient can be asked for."""
    # Under forward-mode AD apply() says that there is no such derivative; a plain call would silently have none
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    if transformed or wants_gradient(*(t for t in inputs[:-1] if t is not None)):
        return LSTMFunction.apply(*inputs)[:3]
    return layer_forward(inputs, save=False)[:3]


def layer_forward(
    inputs: tuple[Any, ...], *, save: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """LSTMFunction's inputs -> y, h_n, c_n and, if `save`, the gates (T, B, 4H) and every c (T, B, H)."""
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, r0, reverse = inputs
    bias = None if b_ih is None or b_hh is None else b_ih + b_hh
    xg = torch.nn.functional.linear(x, w_ih, bias).contiguous()
    last = 0 if reverse else -1
    if r0 is not None:
        xg[-1 if reverse else 0] += r0
    c0 = c0.to(accumulator(x.dtype))
    plan = plan_for(xg, backward=False)
    y, c_n, c_all = lstm_forward(xg, _plain(w_hh), _plain(h0), _plain(c0), plan=plan, reverse=reverse, save=save)
    return y, y[last].clone(), c_n.to(x.dtype), xg if save else None, c_all


class LSTMFunction(torch.autograd.Function):
    """(x, h0, c0, w_ih, w_hh, b_ih, b_hh, r0, reverse) -> (y, h_n, c_n, gates, c); the last two carry no gradient.

    Shapes as in lstm_reference; the biases and r0 may be None.
    """

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return layer_forward(inputs, save=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.reverse = inputs
        y, _, _, gates, c_all = output
        ctx.mark_non_differentiable(gates, c_all)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, y, gates, c_all)

    @staticmethod
    def backward(ctx: Any, dy: Any, dh_n: Any, dc_n: Any, _gates: Any, _c: Any) -> Any:
        saved = ctx.saved_tensors  # once: checkpointing unpacks every tensor a single time
        with _without_autocast(saved[0]):
            grads = LSTMBackward.apply(dy, dh_n, dc_n, *saved, ctx.reverse, ctx.needs_input_grad[:8])
        return *grads, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return _loop_over_batch(LSTMFunction.apply, info, in_dims, *inputs)


class LSTMBackward(torch.autograd.Function):
    """LSTMFunction's backward pass as a function of (dy, dh_n, dc_n) and of all that LSTMFunction saved.

    Its own backward differentiates lstm_reference twice, so that a double backward is right; y, gates and c, which only
    repeat what the inputs determine, get no gradient of their own.
    """

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *tensors, reverse, wanted = arguments
        return layer_backward(*tensors, reverse=reverse, wanted=wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.reverse, ctx.wanted = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:11])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        saved = ctx.saved_tensors
        with _without_autocast(saved[3]):
            grads = _differentiate_twice(saved, cotangents, ctx.wanted, ctx.reverse)
        return *grads, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _loop_over_batch(LSTMBackward.apply, info, in_dims, *arguments)


def layer_backward(
    dy: torch.Tensor | None,
    dh_n: torch.Tensor | None,
    dc_n: torch.Tensor | None,
    x: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None,
    b_hh: torch.Tensor | None,
    r0: torch.Tensor | None,
    y: torch.Tensor,
    gates: torch.Tensor,
    c_all: torch.Tensor,
    *,
    reverse: bool,
    wanted: tuple[bool, ...],
) -> Tensors:
    """Gradients of x, h0, c0, w_ih, w_hh, b_ih, b_hh, r0, None where not `wanted`; the weights' by GEMMs over all T."""
    dgates, dc0 = lstm_backward(
        None if dy is None else _plain(dy),
        None if dh_n is None else _plain(dh_n),
        dc_n,
        _plain(w_hh),
        _plain(c0.to(c_all.dtype)),
        gates,
        c_all,
        plan=plan_for(gates, backward=True),
        reverse=reverse,
    )
    flat = dgates.flatten(0, 1)  # (T*B, 4H)
    first, later, before = (dgates[-1], dgates[:-1], y[1:]) if reverse else (dgates[0], dgates[1:], y[:-1])
    need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_r0 = wanted
    db = flat.sum(0) if need_b_ih or need_b_hh else None
    return (
        (flat @ w_ih).view(x.shape) if need_x else None,
        first @ w_hh if need_h0 else None,
        dc0.to(c0.dtype) if need_c0 else None,
        flat.t() @ x.flatten(0, 1) if need_w_ih else None,
        torch.addmm(first.t() @ h0, later.flatten(0, 1).t(), before.flatten(0, 1)) if need_w_hh else None,
        db if need_b_ih else None,
        db.clone() if db is not None and need_b_hh else None,
        first.clone() if need_r0 else None,
    )


def _differentiate_twice(
    saved: tuple[Any, ...], cotangents: tuple[Any, ...], wanted: tuple[bool, ...], reverse: bool
) -> list[Any]:
    """Gradients of dy, dh_n, dc_n and LSTMFunction's eight tensors, given `cotangents` for the latter's gradients."""
    result: list[Any] = [None] * len(saved)
    present = [i for i, t in enumerate(saved) if t is not None]
    kept = [i for i, cotangent in enumerate(cotangents) if cotangent is not None and wanted[i]]
    if not kept:
        return result
    reference: Any = lstm_reference

    def gradients(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        wide: list[Any] = [None] * len(saved)
        for i, t in zip(present, tensors, strict=True):
            wide[i] = t.to(accumulator(t.dtype))

        def outputs(*changed: torch.Tensor) -> tuple[torch.Tensor, ...]:
            arguments = wide[3:]
            for i, t in zip(kept, changed, strict=True):
                arguments[i] = t
            return reference(*arguments, reverse)

        values, pull_back, *_ = torch.func.vjp(outputs, *(wide[3 + i] for i in kept))
        return pull_back(tuple(torch.zeros_like(v) if d is None else d for v, d in zip(values, wide[:3], strict=True)))

    values, pull_back, *_ = torch.func.vjp(gradients, *(saved[i] for i in present))
    second = pull_back(tuple(cotangents[i].to(v.dtype) for i, v in zip(kept, values, strict=True)))
    for i, grad in zip(present, second, strict=True):
        result[i] = grad
    return result


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """What a kernel can read: contiguous, and with the sign that PyTorch keeps apart in some views."""
    return tensor.contiguous().resolve_neg()


def _without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """What ran in one dtype forward runs in it backward, wherever `backward` is called."""
    return torch.autocast(tensor.device.type, enabled=False)


def _loop_over_batch(function: Any, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    """vmap's rule for `function`: one call for each element of the mapped axis."""

    def element(argument: Any, dim: Any, k: int) -> Any:
        return argument.select(dim, k) if isinstance(argument, torch.Tensor) and dim is not None else argument

    calls = [
        function(*(element(a, d, k) for a, d in zip(arguments, in_dims, strict=True))) for k in range(info.batch_size)
    ]
    outputs = tuple(None if call[0] is None else torch.stack(call) for call in zip(*calls, strict=True))
    return outputs, tuple(None if out is None else 0 for out in outputs)
