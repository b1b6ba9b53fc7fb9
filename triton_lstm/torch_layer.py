"""A layer in plain torch: what double backward differentiates, and what PyTorch's own LSTM does not return."""

from __future__ import annotations

import torch

from triton_lstm.packing import add_to_first_rows, batch_sizes_of

Tensor = torch.Tensor
linear = torch.nn.functional.linear


def loop_by_torch(
    xg: Tensor, h0: Tensor, c0: Tensor, w_hh: Tensor, batch_sizes: list[int] | None = None
) -> tuple[Tensor, ...]:
    """The time loop of a layer in D directions of time, as the kernels have it.

    xg: the input's share of the pre-activations, (T, B, D*4H), or packed (N, D*4H) with the rows of every step; h0 and
    c0 (B, D*H); w_hh (D, 4H, H). Returns y, h_n, c_n, the gates and every c, with D*H or D*4H features, but h_n and c_n
    (D, B, H).
    """
    directions = w_hh.shape[0]
    results = []
    for d in range(directions):
        part, h, c = (t.chunk(directions, -1)[d] for t in (xg, h0, c0))
        steps, h, c = direction_steps(part, h, c, w_hh[d], None, batch_sizes, against_time=d == 1)
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
    *,
    against_time: bool,
) -> tuple[list[tuple[Tensor, ...]], Tensor, Tensor]:
    """One direction of loop_by_torch: gates, c and h of the rows of every step t, and the last h and c.

    w_hr (P, H): a projection, for h of P features.
    """
    rows: list[tuple[Tensor, ...]] = []
    steps = xg.unbind(0) if batch_sizes is None else xg.split(batch_sizes)
    for xg_t in reversed(steps) if against_time else steps:
        here = xg_t.shape[0]  # sequences past their end, or not begun against time, keep their state
        i, f, g, o = (xg_t + linear(h[:here], w_hh)).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_t = f * c[:here] + i * g
        h_t = o * c_t.tanh()
        h_t = h_t if w_hr is None else linear(h_t, w_hr)
        rows.append((torch.cat([i, f, g, o], -1), c_t, h_t))
        c, h = torch.cat([c_t, c[here:]]), torch.cat([h_t, h[here:]])
    return rows[::-1] if against_time else rows, h, c


def preactivations(
    x: Tensor,
    w_ih: Tensor,
    biases: Tensor | None,
    r0: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    """The input's share of the gates' pre-activations and r0, contiguous."""
    xg = linear(x, w_ih.flatten(0, 1), None if biases is None else biases.sum(0).flatten()).contiguous()
    if r0 is not None:
        add_to_first_rows(xg, r0, len(w_ih), starts, lengths)
    return xg


def layer_by_torch(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    biases: Tensor | None,
    r0: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, ...]:
    """A layer's arguments -> its results (see layer.py)."""
    wide = torch.promote_types(x.dtype, torch.float32)  # the state c adds up rounding errors in 16 bits
    xg = preactivations(x, w_ih, biases, r0, starts, lengths).to(wide)
    c0 = c0.to(wide)
    h0 = torch.zeros_like(c0) if h0 is None else h0.to(wide)
    *results, c = loop_by_torch(xg, h0, c0, w_hh.to(wide), batch_sizes_of(starts))
    return *(result.to(x.dtype) for result in results), c
