"""Recording on PyTorch's path: its own LSTM makes the model's results, the reference beside it what is recorded.

PyTorch's LSTM hands out no gradient of a step. The reference makes them again from each layer's input and from the
gradients that reached its outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from triton_lstm.checks import Group
from triton_lstm.packing import batch_sizes_of, starts_and_lengths
from triton_lstm.record import Quantities, Tap, Taps, listen, listening
from triton_lstm.torch_layer import direction_steps

Tensor = torch.Tensor


def recorded_lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    weights: list[Group],
    options: tuple[bool, int, float, bool, bool],
    batch_first: bool,
    batch_sizes: Tensor | None,
    taps: Sequence[Taps],
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.lstm layer by layer, which on the CPU gives the same bits, with every layer's gradients heard."""
    has_biases, num_layers, dropout, train, bidirectional = options
    directions = 2 if bidirectional else 1
    transposed = batch_first and batch_sizes is None
    x = input.transpose(0, 1) if transposed else input
    h_n, c_n = [], []
    for k in range(num_layers):
        rows = slice(k * directions, (k + 1) * directions)
        groups = weights[rows]
        params = [weight for group in groups for weight in group if weight is not None]
        if x.is_cuda and num_layers > 1 and not has_biases:
            # Of several layers in one buffer PyTorch takes the first for its own, and what follows it for its biases
            params = [weight.clone() for weight in params]
        states = [state[rows] for state in hx]
        one_layer = has_biases, 1, 0.0, train, bidirectional
        if batch_sizes is None:
            y, h, c = torch.lstm(x, states, params, *one_layer, False)
        else:
            y, h, c = torch.lstm(x, batch_sizes, states, params, *one_layer)
        starts = None if batch_sizes is None else starts_and_lengths(batch_sizes, x.device)[0]
        y, h, c = listen_to_layer(taps[k], (y, h, c), x, states, groups, starts)
        h_n.append(h)
        c_n.append(c)
        x = torch.nn.functional.dropout(y, dropout, True) if train and dropout and k < num_layers - 1 else y
    return x.transpose(0, 1) if transposed else x, torch.cat(h_n), torch.cat(c_n)


def listen_to_layer(
    taps: Taps,
    outputs: tuple[Tensor, ...],
    x: Tensor,
    states: Sequence[Tensor],
    groups: list[Group],
    starts: Tensor | None,
) -> tuple[Tensor, ...]:
    """A layer's `outputs` again, y, h_n, c_n and maybe the gates and every c, each backward pass of theirs taken down.

    x: the layer's input, dense or packed; states: h0 (D, B, P or H) and c0 (D, B, H); groups: each direction's weights.
    """
    if not listening(taps) or not any(output.requires_grad for output in outputs):
        return outputs
    used = [t for t in (x, *states, *(w for group in groups for w in group)) if t is not None and not t.is_inference()]
    versions = [t._version for t in used]
    arguments = x.detach(), [state.detach() for state in states], [[_detached(w) for w in g] for g in groups]
    for tap in listening(taps):
        tap.arguments = arguments, used

    def note(live: list[Tap], grads: tuple[Tensor | None, ...]) -> None:
        (x, states, groups), used = live[0].arguments
        if [t._version for t in used] != versions:
            warnings.warn(
                "the input or a weight of an LSTM was changed in place between its call and the backward pass: "
                "record_gradients cannot make that pass's gradients again and leaves it out",
                stacklevel=2,
            )
            return
        cotangents = [*grads, *[None] * (5 - len(grads))]
        rows, gates = _gradients(cotangents, x, states, groups, starts)
        for tap in live:
            tap.keep(rows, [{} for _ in rows], gates, cotangents, starts)

    del used, arguments  # the taps hold them, until the recording ends
    return tuple(listen(taps, list(outputs), note))


def _detached(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach()


def _gradients(
    cotangents: list[Tensor | None], x: Tensor, states: Sequence[Tensor], groups: list[Group], starts: Tensor | None
) -> tuple[list[Quantities], Tensor]:
    """The quantities of each direction, and the gates (.., D*4H), by autograd on the reference."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dtype, directions, batch_sizes = x.dtype, len(groups), batch_sizes_of(starts)

    def leaf(t: Tensor) -> Tensor:
        return t.detach().to(wide, copy=True).requires_grad_()

    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x, h0, c0 = leaf(x), *([leaf(s) for s in state] for state in states)
        join = torch.stack if batch_sizes is None else torch.cat
        outputs, given, inner, gates = [], [], [], []
        for d, group in enumerate(groups):
            weights: list[Any] = [None if w is None else w.detach().to(wide) for w in group]
            w_ih, w_hh, b_ih, b_hh, w_hr = weights
            bias = None if b_ih is None else b_ih + b_hh
            xg = torch.nn.functional.linear(x, w_ih, bias)
            steps, h_n, c_n = direction_steps(xg, h0[d], c0[d], w_hh, w_hr, batch_sizes, against_time=d == 1)
            every_gate, every_c, every_h = zip(*steps, strict=True)
            gates.append(join(every_gate))
            of_direction = [join(every_h), h_n, c_n, gates[d], join(every_c)]
            for k, (output, grad) in enumerate(zip(of_direction, cotangents, strict=True)):
                if grad is not None:
                    outputs.append(output)
                    given.append((grad[d] if k in (1, 2) else grad.chunk(directions, -1)[d]).to(wide))
            inner.append((xg, every_h, every_c))
        wanted = [x, *h0, *c0, *(t for xg, hs, cs in inner for t in (xg, *hs, *cs))]
        found = iter(torch.autograd.grad(outputs, wanted, given, materialize_grads=True))
    dx, dh0, dc0 = next(found).to(dtype), [next(found) for _ in h0], [next(found) for _ in c0]
    rows = []
    for d, (_, every_h, every_c) in enumerate(inner):
        dgates = next(found).to(dtype)
        dh, dc = join([next(found) for _ in every_h]), join([next(found) for _ in every_c])
        dy = cotangents[0]
        dy = torch.zeros_like(dh, dtype=dtype) if dy is None else dy.detach().chunk(directions, -1)[d].clone()
        row = {"input": dx, "output": dy, "hidden": dh, "cell": dc, "gates": dgates}
        rows.append(row | {"h0": dh0[d].to(dtype), "c0": dc0[d].to(dtype)})
    return rows, torch.cat(gates, -1).detach()
