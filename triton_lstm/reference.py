"""The LSTM in twenty lines of torch: the tests' oracle, and what double backward differentiates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from triton_lstm.packing import add_to_first_rows, batch_sizes_of


def lstm_reference(
    x: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    w_ih: torch.Tensor | None,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None = None,
    b_hh: torch.Tensor | None = None,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer and direction, with the equations and the gate order (i, f, g, o) of torch.nn.LSTM's documentation.

    x (T, B, I), h0 and c0 (B, H), w_ih (4H, I), w_hh (4H, H), biases (4H,). Returns y (T, B, H), h_n and c_n (B, H).
    """
    steps = reversed(x.unbind(0)) if reverse else x.unbind(0)
    _, c, h = zip(*lstm_steps(steps, h0, c0, w_ih, w_hh, b_ih, b_hh), strict=True)
    return torch.stack(h[::-1] if reverse else h), h[-1], c[-1]


def lstm_steps(
    x: Iterable[torch.Tensor],
    h: torch.Tensor,
    c: torch.Tensor,
    w_ih: torch.Tensor | None,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None = None,
    b_hh: torch.Tensor | None = None,
    w_hr: torch.Tensor | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Every step's gates i, f, g, o (B, 4H), c (B, H) and h (B, P or H); arguments as lstm_reference's, x in the order
    of steps.

    Without w_ih, x is the input's share of the gates' pre-activations. w_hr (P, H): a projection.
    """
    for x_t in x:
        x_gates = x_t if w_ih is None else torch.nn.functional.linear(x_t, w_ih, b_ih)
        i, f, g, o = (x_gates + torch.nn.functional.linear(h, w_hh, b_hh)).chunk(4, dim=-1)
        gates = torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], dim=-1)
        i, f, g, o = gates.chunk(4, dim=-1)
        c = f * c + i * g
        h = o * c.tanh()
        h = h if w_hr is None else torch.nn.functional.linear(h, w_hr)
        yield gates, c, h


def layer_reference(
    xg: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor, w_hh: torch.Tensor, batch_sizes: list[int] | None = None
) -> tuple[torch.Tensor, ...]:
    """One layer in D directions of time, as the kernels have it.

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
    columns = enumerate(zip(*results, strict=True))
    return tuple(torch.stack(parts) if k in (1, 2) else torch.cat(parts, -1) for k, parts in columns)


def direction_steps(
    xg: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor,
    w_hh: torch.Tensor,
    w_hr: torch.Tensor | None,
    batch_sizes: list[int] | None,
    *,
    against_time: bool,
) -> tuple[list[tuple[torch.Tensor, ...]], torch.Tensor, torch.Tensor]:
    """One direction of layer_reference: gates, c and h of the rows of every step t, and the last h and c.

    w_hr (P, H): a projection, for h of P features.
    """
    rows: list[tuple[torch.Tensor, ...]] = []
    steps = xg.unbind(0) if batch_sizes is None else xg.split(batch_sizes)
    for x_t in reversed(steps) if against_time else steps:
        here = x_t.shape[0]  # sequences past their end, or not begun against time, keep their state
        [step] = lstm_steps([x_t], h[:here], c[:here], None, w_hh, w_hr=w_hr)
        rows.append(step)
        c, h = torch.cat([step[1], c[here:]]), torch.cat([step[2], h[here:]])
    return rows[::-1] if against_time else rows, h, c


def preactivations(
    x: torch.Tensor,
    w_ih: torch.Tensor,
    biases: torch.Tensor | None,
    r0: torch.Tensor | None,
    starts: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> torch.Tensor:
    """The input's share of the gates' pre-activations and r0, contiguous."""
    xg = torch.nn.functional.linear(
        x, w_ih.flatten(0, 1), None if biases is None else biases.sum(0).flatten()
    ).contiguous()
    if r0 is not None:
        add_to_first_rows(xg, r0, len(w_ih), starts, lengths)
    return xg


def layer_by_torch(
    x: torch.Tensor,
    h0: torch.Tensor | None,
    c0: torch.Tensor,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    biases: torch.Tensor | None,
    r0: torch.Tensor | None,
    starts: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """A layer's arguments -> its results, in plain torch: for what PyTorch's own LSTM does not return."""
    wide = torch.promote_types(x.dtype, torch.float32)  # the state c adds up rounding errors in 16 bits
    xg = preactivations(x, w_ih, biases, r0, starts, lengths).to(wide)
    c0 = c0.to(wide)
    h0 = torch.zeros_like(c0) if h0 is None else h0.to(wide)
    *results, c = layer_reference(xg, h0, c0, w_hh.to(wide), batch_sizes_of(starts))
    return *(result.to(x.dtype) for result in results), c
