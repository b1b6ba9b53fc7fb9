"""The LSTM in twenty lines of torch: the tests' oracle, and what double backward differentiates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch


def lstm_reference(
    x: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    w_ih: torch.Tensor | None,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None = None,
    b_hh: torch.Tensor | None = None,
    r0: torch.Tensor | None = None,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer and direction, with the equations and the gate order (i, f, g, o) of torch.nn.LSTM's documentation.

    x (T, B, I), h0 and c0 (B, H), w_ih (4H, I), w_hh (4H, H), biases (4H,); r0 (B, 4H) is added to the gates'
    pre-activations of the first step. Without w_ih, x (T, B, 4H) is the input's share of the pre-activations.
    Returns y (T, B, H), h_n (B, H), c_n (B, H).
    """
    steps = reversed(x.unbind(0)) if reverse else x.unbind(0)
    _, c, h = zip(*lstm_steps(steps, h0, c0, w_ih, w_hh, b_ih, b_hh, r0), strict=True)
    return torch.stack(h[::-1] if reverse else h), h[-1], c[-1]


def lstm_steps(
    x: Iterable[torch.Tensor],
    h: torch.Tensor,
    c: torch.Tensor,
    w_ih: torch.Tensor | None,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None = None,
    b_hh: torch.Tensor | None = None,
    r0: torch.Tensor | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Every step's gates i, f, g, o (B, 4H), c and h (B, H); arguments as lstm_reference's, x in the order of steps."""
    for step, x_t in enumerate(x):
        x_gates = x_t if w_ih is None else torch.nn.functional.linear(x_t, w_ih, b_ih)
        a = x_gates + torch.nn.functional.linear(h, w_hh, b_hh)
        if r0 is not None and step == 0:
            a = a + r0
        i, f, g, o = a.chunk(4, dim=-1)
        gates = torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], dim=-1)
        i, f, g, o = gates.chunk(4, dim=-1)
        c = f * c + i * g
        h = o * c.tanh()
        yield gates, c, h
