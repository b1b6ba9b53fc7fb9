"""One LSTM layer on the kernels: forward, back-propagation through time, and gradients by GEMMs over all steps."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from triton_lstm.core.packing import add_to_first_rows, first_rows, last_rows, successions
from triton_lstm.kernels import accumulator, lstm_backward, lstm_forward
from triton_lstm.kernels.totals import sums_for
from triton_lstm.operator.arguments import Cotangents, LayerArguments, LayerResults
from triton_lstm.operator.hooks import Totals
from triton_lstm.operator.torch_layer import preactivations
from triton_lstm.tuning.first_call import plan_for

Tensor = torch.Tensor
linear = torch.nn.functional.linear
CHUNK = 128  # rows that a sum adds up at once on the CPU


def layer_forward(arguments: LayerArguments, *, save_gates: bool, save_c: bool) -> LayerResults:
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, r0, starts, lengths, resets = arguments
    directions, batch, hidden_size = arguments.sizes
    if starts is not None:  # sequences begin at different steps of the loop: h0's share is added beforehand
        h0, r0 = None, _initial_share(h0, w_hh, r0, directions)
    xg = preactivations(x, w_ih, b_ih, b_hh)
    if r0 is not None:
        add_to_first_rows(xg, r0, directions, starts, lengths)
    c0 = None if c0 is None else c0.to(accumulator(x.dtype))
    w_hh, h0, c0 = _readable(w_hh, h0, c0)
    y, h_n, c_n, c = lstm_forward(
        xg,
        w_hh,
        h0,
        c0,
        starts=starts,
        lengths=lengths,
        resets=None if resets is None else resets.contiguous(),
        plan=plan_for(xg, batch, hidden_size, directions, backward=False),
        save_gates=save_gates,
        save_c=save_c,
    )
    if h_n is None:
        h_n = last_rows(y, directions, starts, lengths)
    return y, h_n, c_n, xg if save_gates else None, c


def layer_backward(
    cotangents: Cotangents,
    arguments: LayerArguments,
    y: Tensor,
    gates: Tensor | None,
    c: Tensor,
    totals: Totals | None = None,
) -> tuple[Tensor, Tensor]:
    """Back-propagation through time: the gradients of the gates' pre-activations, dgates (.., D*4H), and dc0 (D, B, H).

    y, gates, c: of layer_forward; without gates they are recomputed. Fills `totals`.
    """
    dy, dh_n, dc_n, dact, dc = cotangents
    _, _, c0, _, w_hh, _, _, _, starts, lengths, resets = arguments
    directions, batch, hidden_size = arguments.sizes
    if gates is None:
        gates = _recomputed(arguments, y)
    plan = plan_for(gates, batch, hidden_size, directions, backward=True)
    both = None
    if totals:
        totals.gates = gates
        if totals.every_element:
            both = c.new_empty(*c.shape[:-1], directions, 2, hidden_size)
            totals.dh, totals.dc = both.unbind(-2)
        else:
            steps = len(gates) if starts is None else len(starts) - 2
            totals.sums = sums_for(plan, steps, directions, hidden_size, gates.device)
    c0 = None if c0 is None else c0.to(c.dtype)
    dy, dh_n, w_hh, c0, gates, c, dact, dc = _readable(dy, dh_n, w_hh, c0, gates, c, dact, dc)
    dgates, dc0 = lstm_backward(
        dy,
        dh_n,
        dc_n,
        w_hh,
        c0,
        gates,
        c,
        starts=starts,
        lengths=lengths,
        resets=None if resets is None else resets.contiguous(),
        dact=dact,
        dc_all=dc,
        totals=both,
        sums=totals.sums if totals else None,
        plan=plan,
    )
    return dgates, dc0 if dc0.dtype == y.dtype else dc0.to(y.dtype)


def layer_gradients(
    dgates: Tensor, dc0: Tensor, arguments: LayerArguments, y: Tensor, *, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, h0, c0, w_ih, w_hh, bias and r0, None where not `wanted`. The weights' are GEMMs.

    Each has memory of its own, as those of nn.LSTM, although both biases have the same gradient.
    """
    x, h0, _, w_ih, w_hh, *_, starts, lengths, resets = arguments
    directions = arguments.sizes[0]
    flat = dgates.flatten(0, -2)  # (N, D*4H)
    need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_r0 = wanted
    db = flat.sum(0) if need_b_ih or need_b_hh else flat
    first: Tensor | None = None
    if h0 is not None or need_r0:
        first = first_rows(dgates, directions, starts, lengths)
    return (
        (flat @ w_ih).view(x.shape) if need_x else None,
        _through_weights(first, w_hh, directions) if need_h0 and first is not None else None,
        dc0 if need_c0 else None,
        _over_rows(flat, x.flatten(0, -2)) if need_w_ih else None,
        _recurrent_gradient(dgates, first, h0, y, directions, starts, lengths, resets) if need_w_hh else None,
        db if need_b_ih else None,
        db.clone() if need_b_hh and need_b_ih else db if need_b_hh else None,
        first if need_r0 else None,
    )


def _through_weights(first: Tensor, w_hh: Tensor, directions: int) -> Tensor:
    """dh0 (D, B, H)."""
    if directions == 1:
        return (first @ w_hh).unsqueeze(0)
    parts = zip(first.chunk(directions, -1), w_hh.chunk(directions), strict=True)
    return torch.stack([part @ w for part, w in parts])


def _recurrent_gradient(
    dgates: Tensor,
    first: Tensor | None,
    h0: Tensor | None,
    y: Tensor,
    directions: int,
    starts: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> Tensor:
    """dW_hh (D*4H, H)."""
    grads = []
    for d in range(directions):
        later, earlier, begin = dgates, y, first
        if directions == 2:
            later, earlier = dgates.chunk(2, -1)[d], y.chunk(2, -1)[d]
            begin = None if first is None else first.chunk(2, -1)[d]
        now, before = successions(later, earlier, starts, lengths, resets, against_time=d == 1)
        start = None if h0 is None or begin is None else begin.t() @ h0[d]
        grads.append(_over_rows(now, before, start))
    return grads[0] if directions == 1 else torch.cat(grads)


def _over_rows(a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
    """start + a.t() @ b, a sum over their rows; on the CPU in chunks of them, as its libraries add up thin products in
    one long chain. Not in 16 bits, where that ends in a single rounding."""
    rows = a.shape[0]
    whole = a.device.type != "cpu" or a.dtype.itemsize < 4 or not isinstance(rows, int)  # symbolic while compiling
    size = 0 if whole else max(CHUNK, math.isqrt(rows))
    if whole or rows <= size:
        return a.t() @ b if start is None else torch.addmm(start, a.t(), b)
    parts = [p.t() @ q for p, q in zip(a.split(size), b.split(size), strict=True)]
    return functools.reduce(torch.add, parts if start is None else [start, *parts])


def _initial_share(h0: Tensor | None, w_hh: Tensor, r0: Tensor | None, directions: int) -> Tensor | None:
    """(B, D*4H): what h0 and r0 add to the pre-activations of each sequence's first step."""
    if h0 is None:
        return r0
    share = torch.cat([linear(h, w) for h, w in zip(h0, w_hh.chunk(directions), strict=True)], -1)
    return share if r0 is None else share + r0


def _recomputed(arguments: LayerArguments, y: Tensor) -> Tensor:
    """The gates, by one GEMM over all steps for each direction: every h[t-1] is known by now."""
    x, h0, _, w_ih, w_hh, b_ih, b_hh, r0, starts, lengths, resets = arguments
    directions, _, hidden_size = arguments.sizes
    share = _initial_share(h0, w_hh, r0, directions)
    gates = preactivations(x, w_ih, b_ih, b_hh)
    if share is not None:
        add_to_first_rows(gates, share, directions, starts, lengths)
    for d, w in enumerate(w_hh.chunk(directions)):
        a, h = gates.chunk(directions, -1)[d], y.chunk(directions, -1)[d]
        now, before = successions(a, h, starts, lengths, resets, against_time=d == 1)
        now.addmm_(before, w.t())
    split = gates.view(*gates.shape[:-1], directions, 4, hidden_size)
    split[..., :2, :].sigmoid_()
    split[..., 2, :].tanh_()
    split[..., 3, :].sigmoid_()
    return gates


def _readable(*tensors: Tensor | None) -> list[Any]:
    """What a kernel can read: contiguous, and with the sign that PyTorch keeps apart in some views."""
    result = []
    for tensor in tensors:
        if tensor is not None and (tensor.is_neg() or not tensor.is_contiguous()):
            tensor = tensor.contiguous().resolve_neg()
        result.append(tensor)
    return result
