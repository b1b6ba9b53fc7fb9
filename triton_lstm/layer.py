"""One LSTM layer: its forward pass, back-propagation through time and gradients; allocates, multiplies, launches.

A layer's arguments, here and below, with D directions of time:
    x       (T, B, I), or packed (N, I)
    h0      (B, D*H), or None for zeros
    c0      (B, D*H)
    w_ih    (D, 4H, I)
    w_hh    (D, 4H, H)
    biases  (2, D, 4H), b_ih and b_hh, or None
    r0      (B, D*4H), added to the pre-activations of each sequence's first step, or None (see stack.py)
    starts, lengths: of packed data (see packing.py), or None
Its results, y and c of every step, have x's rows and D*H features, its gates D*4H; h_n and c_n are (D, B, H), each in
memory of its own and no view.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import overload

import torch

from triton_lstm.backend import precision_name, wants_tuning
from triton_lstm.kernels import accumulator, device_facts, lstm_backward, lstm_forward
from triton_lstm.kernels.totals import sums_for
from triton_lstm.packing import first_rows, last_rows, side_by_side, stacked, successions
from triton_lstm.plan import Plan
from triton_lstm.table_file import Key
from triton_lstm.tables import Choice, choose
from triton_lstm.torch_layer import preactivations

Tensor = torch.Tensor
linear = torch.nn.functional.linear
CHUNK = 128  # rows that a sum adds up at once on the CPU


@dataclasses.dataclass
class Totals:
    """What the recorder of gradients gets out of a backward pass: of every element, or else sums for each step."""

    every_element: bool
    dh: Tensor | None = None  # dL/dh of every step, (.., D, H) in the accumulator's dtype
    dc: Tensor | None = None
    sums: Tensor | None = None  # of both, (T, D, programs, 2, 5): see kernels/totals.py
    gates: Tensor | None = None  # i, f, g, o themselves


def plan_for(like: Tensor, batch: int, hidden_size: int, directions: int = 1, *, backward: bool) -> Plan:
    """The plan for a time loop in `like`'s dtype, on its device."""
    return choice_for(like.dtype, like.device, batch, hidden_size, backward, directions).plan


def choice_for(
    dtype: torch.dtype, device: torch.device, batch: int, hidden_size: int, backward: bool, directions: int = 1
) -> Choice:
    """The plan for a layer of this dtype and size, and where it is from; measured first if the user wants that."""
    key = Key(backward, precision_name(dtype, device), hidden_size, batch)
    choice = choose(device_facts(device), key, directions)
    if batch and wants_tuning(device) and not choice.exactly(key):
        from triton_lstm.tune import tune_now

        tune_now(key, device)
        choice = choose(device_facts(device), key, directions)
    return choice


def layer_forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    biases: Tensor | None,
    r0: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    *,
    save_gates: bool,
    save_c: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """A layer's arguments -> y, h_n, c_n, and the gates and every c (in the accumulator's dtype) if they are saved."""
    directions, _, hidden_size = w_hh.shape
    batch = c0.shape[0]
    if starts is not None:  # sequences begin at different steps of the loop: h0's share goes ahead
        h0, r0 = None, _initial_share(h0, w_hh, r0)
    elif h0 is None:
        h0 = torch.zeros_like(c0, dtype=x.dtype)
    xg = preactivations(x, w_ih, biases, r0, starts, lengths)
    y, c_n, c_all = lstm_forward(
        xg,
        _plain(w_hh),
        _plain(h0),
        _plain(c0.to(accumulator(x.dtype))),
        starts,
        lengths,
        plan=plan_for(xg, batch, hidden_size, directions, backward=False),
        save_gates=save_gates,
        save_c=save_c,
    )
    h_n, c_n = last_rows(y, directions, starts, lengths), c_n.to(x.dtype)
    if directions == 1:
        c_n.unsqueeze_(0)  # in place, or it would be a view
    else:
        c_n = stacked(c_n.chunk(directions, -1))
    return y, h_n, c_n, xg if save_gates else None, c_all


def layer_backward(
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
    c_all: Tensor,
    totals: Totals | None = None,
) -> tuple[Tensor, Tensor]:
    """Back-propagation through time: the gradients of the gates' pre-activations and of c0. Fills `totals`."""
    directions, _, hidden_size = w_hh.shape
    batch = c0.shape[0]
    if gates is None:
        gates = _recomputed(x, h0, w_ih, w_hh, biases, r0, starts, lengths, y)
    plan = plan_for(gates, batch, hidden_size, directions, backward=True)
    both = None
    if totals:
        totals.gates = gates
        if totals.every_element:
            both = c_all.new_empty(*c_all.shape[:-1], directions, 2, hidden_size)
            totals.dh, totals.dc = both.unbind(-2)
        else:
            steps = len(gates) if starts is None else len(starts) - 2
            totals.sums = sums_for(plan, steps, directions, hidden_size, gates.device)
    dgates, dc0 = lstm_backward(
        _plain(dy),
        None if dh_n is None else _plain(side_by_side(dh_n)),
        None if dc_n is None else side_by_side(dc_n),
        _plain(w_hh),
        _plain(c0.to(c_all.dtype)),
        _plain(gates),
        _plain(c_all),
        starts,
        lengths,
        dact=_plain(dact),
        dc_all=_plain(dc_all),
        totals=both,
        sums=totals.sums if totals else None,
        plan=plan,
    )
    return dgates, dc0.to(c0.dtype)


def layer_gradients(
    dgates: Tensor,
    dc0: Tensor,
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
    *,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, h0, c0, w_ih, w_hh, biases and r0, None where not `wanted`; the weights' by GEMMs over all T."""
    directions, _, hidden_size = w_hh.shape
    flat = dgates.flatten(0, -2)  # (N, D*4H)
    need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_biases, need_r0 = wanted
    first: Tensor | None = None
    firsts: tuple[Tensor, ...] = ()
    if h0 is not None or need_r0:
        first = first_rows(dgates, directions, starts, lengths)
        firsts = first.chunk(directions, -1)
    db = flat.sum(0).view(directions, 4 * hidden_size) if need_biases else None

    def recurrent(d: int) -> Tensor:
        now, before = successions(
            dgates.chunk(directions, -1)[d], y.chunk(directions, -1)[d], starts, lengths, against_time=d == 1
        )
        if h0 is None:
            return _over_rows(now, before)
        return _over_rows(now, before, firsts[d].t() @ h0.chunk(directions, -1)[d])

    return (
        (flat @ w_ih.flatten(0, 1)).reshape(x.shape) if need_x else None,
        torch.cat([part @ w for part, w in zip(firsts, w_hh, strict=True)], -1) if need_h0 else None,
        dc0 if need_c0 else None,
        _over_rows(flat, x.flatten(0, -2)).reshape(w_ih.shape) if need_w_ih else None,
        torch.stack([recurrent(d) for d in range(directions)]) if need_w_hh else None,
        torch.stack([db, db]) if db is not None else None,  # two in memory, or they would not add up over several calls
        first if need_r0 else None,
    )


def _over_rows(a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
    """start + a.t() @ b, a sum over their rows; on the CPU in chunks of them, as its libraries add up thin products in
    one long chain. Not in 16 bits, where that ends in a single rounding."""
    rows = a.shape[0]
    if a.device.type != "cpu" or a.dtype.itemsize < 4 or not isinstance(rows, int):  # not a number yet: while compiling
        return a.t() @ b if start is None else torch.addmm(start, a.t(), b)
    size = max(CHUNK, math.isqrt(rows))
    parts = [p.t() @ q for p, q in zip(a.split(size), b.split(size), strict=True)]
    return functools.reduce(torch.add, parts if start is None else [start, *parts])


def _initial_share(h0: Tensor | None, w_hh: Tensor, r0: Tensor | None) -> Tensor | None:
    """(B, D*4H): what h0 and r0 add to the pre-activations of each sequence's first step."""
    if h0 is None:
        return r0
    share = torch.cat([linear(h, w) for h, w in zip(h0.chunk(len(w_hh), -1), w_hh, strict=True)], -1)
    return share if r0 is None else share + r0


def _recomputed(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    biases: Tensor | None,
    r0: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    y: Tensor,
) -> Tensor:
    """The gates, by one GEMM over all steps for each direction: every h[t-1] is known by now."""
    directions, _, hidden_size = w_hh.shape
    gates = preactivations(x, w_ih, biases, _initial_share(h0, w_hh, r0), starts, lengths)
    for d in range(directions):
        a, h = gates.chunk(directions, -1)[d], y.chunk(directions, -1)[d]
        now, before = successions(a, h, starts, lengths, against_time=d == 1)
        now.addmm_(before, w_hh[d].t())
    split = gates.view(*gates.shape[:-1], directions, 4, hidden_size)
    split[..., :2, :].sigmoid_()
    split[..., 2, :].tanh_()
    split[..., 3, :].sigmoid_()
    return gates


@overload
def _plain(tensor: Tensor) -> Tensor: ...


@overload
def _plain(tensor: Tensor | None) -> Tensor | None: ...


def _plain(tensor: Tensor | None) -> Tensor | None:
    """What a kernel can read: contiguous, and with the sign that PyTorch keeps apart in some views."""
    return None if tensor is None else tensor.contiguous().resolve_neg()
