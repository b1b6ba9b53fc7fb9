"""A layer in plain torch: what double backward differentiates, and what PyTorch's own LSTM does not return."""

from __future__ import annotations

import torch

from triton_lstm.core.packing import batch_sizes_of, with_first_rows
from triton_lstm.operator.arguments import LayerArguments, LayerResults

Tensor = torch.Tensor
linear = torch.nn.functional.linear


def loop_by_torch(
    xg: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    batch_sizes: list[int] | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The time loop of a layer in D directions of time, as the kernels have it.

    xg: the input's share of the pre-activations, (T, B, D*4H), or packed (N, D*4H) with the rows of every step; h0 and
    c0 (D, B, H); w_hh (D*4H, H); resets: of packing.py. Returns y, h_n, c_n, the gates and every c, with D*H or D*4H
    features, but h_n and c_n (D, B, H).
    """
    directions = len(c0)
    results = []
    for d, (part, w) in enumerate(zip(xg.chunk(directions, -1), w_hh.chunk(directions), strict=True)):
        steps, h, c = direction_steps(part, h0[d], c0[d], w, None, batch_sizes, resets, against_time=d == 1)
        join = torch.stack if batch_sizes is None else torch.cat
        gates, c_all, y = (join(column) for column in zip(*steps, strict=True))
        results.append((y, h, c, gates, c_all))
    ys, h_n, c_n, all_gates, all_c = zip(*results, strict=True)
    return torch.cat(ys, -1), torch.stack(h_n), torch.stack(c_n), torch.cat(all_gates, -1), torch.cat(all_c, -1)


def direction_steps(
    xg: Tensor,
    h: Tensor,
    c: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    batch_sizes: list[int] | None,
    resets: Tensor | None,
    *,
    against_time: bool,
) -> tuple[list[tuple[Tensor, ...]], Tensor, Tensor]:
    """One direction of loop_by_torch: gates, c and h of the rows of every step t, and the last h and c.

    w_hr (P, H): a projection, for h of P features.
    """
    rows: list[tuple[Tensor, ...]] = []
    steps = _by_step(xg, batch_sizes)
    begins = None if resets is None else _by_step(resets, batch_sizes)
    times = range(len(steps))
    for t in reversed(times) if against_time else times:
        xg_t = steps[t]
        here = xg_t.shape[0]  # sequences past their end, or not begun against time, keep their state
        bound = t + 1 if against_time else t
        if begins is not None and 0 < bound < len(steps):
            h, c = (_zero_first(state, begins[bound]) for state in (h, c))
        i, f, g, o = (xg_t + linear(h[:here], w_hh)).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_t = f * c[:here] + i * g
        h_t = o * c_t.tanh()
        h_t = h_t if w_hr is None else linear(h_t, w_hr)
        rows.append((torch.cat([i, f, g, o], -1), c_t, h_t))
        c, h = torch.cat([c_t, c[here:]]), torch.cat([h_t, h[here:]])
    return rows[::-1] if against_time else rows, h, c


def _by_step(rows: Tensor, batch_sizes: list[int] | None) -> tuple[Tensor, ...]:
    return rows.unbind(0) if batch_sizes is None else rows.split(batch_sizes)


def _zero_first(state: Tensor, begins: Tensor) -> Tensor:
    """`state` (B, F), zero in those of the first rows that begin a segment."""
    here = begins.shape[0]
    kept = torch.where(begins.unsqueeze(-1), 0.0, state[:here])
    return kept if here == state.shape[0] else torch.cat([kept, state[here:]])


def preactivations(x: Tensor, w_ih: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    """The input's share of the gates' pre-activations, contiguous."""
    bias = None if b_ih is None or b_hh is None else b_ih + b_hh
    return linear(x, w_ih, bias).contiguous()


def all_preactivations(arguments: LayerArguments) -> Tensor:
    """The same, and r0."""
    x, _, _, w_ih, _, b_ih, b_hh, r0, starts, lengths, _ = arguments
    xg = preactivations(x, w_ih, b_ih, b_hh)
    return xg if r0 is None else with_first_rows(xg, r0, arguments.sizes[0], starts, lengths)


def layer_by_torch(arguments: LayerArguments) -> LayerResults:
    """As layer.layer_forward, with the gates and every c."""
    x, h0, c0, _, w_hh, *_, starts, _, resets = arguments
    wide = torch.promote_types(x.dtype, torch.float32)  # the state c adds up rounding errors in 16 bits
    xg = all_preactivations(arguments).to(wide)
    zeros = xg.new_zeros(arguments.sizes)
    h0, c0 = (zeros if state is None else state.to(wide) for state in (h0, c0))
    y, h_n, c_n, gates, c = loop_by_torch(xg, h0, c0, w_hh.to(wide), batch_sizes_of(starts), resets)
    return y.to(x.dtype), h_n.to(x.dtype), c_n.to(x.dtype), gates.to(x.dtype), c
