"""The LSTM in plain PyTorch, as torch.nn.LSTM documents it: a test oracle that shares no code with the kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

Tensor = torch.Tensor
linear = torch.nn.functional.linear


def lstm_reference(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer and direction, with the equations and gate order (i, f, g, o) of torch.nn.LSTM's documentation.

    x (T, B, I), h0 and c0 (B, H), w_ih (4H, I), w_hh (4H, H), biases (4H,). Returns y (T, B, H), h_n and c_n (B, H).
    """
    steps = reversed(x.unbind(0)) if reverse else x.unbind(0)
    _, c, h = zip(*lstm_steps(steps, h0, c0, w_ih, w_hh, b_ih, b_hh), strict=True)
    return torch.stack(h[::-1] if reverse else h), h[-1], c[-1]


def lstm_steps(
    x: Iterable[Tensor],
    h: Tensor,
    c: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The gates i, f, g, o (B, 4H), c (B, H) and h (B, P or H) of every step; arguments as lstm_reference's, x in
    processing order.

    Without w_ih, x is the input's contribution to the pre-activations. w_hr (P, H): a projection.
    """
    for x_t in x:
        x_gates = x_t if w_ih is None else linear(x_t, w_ih, b_ih)
        i, f, g, o = (x_gates + linear(h, w_hh, b_hh)).chunk(4, dim=-1)
        gates = torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], dim=-1)
        i, f, g, o = gates.chunk(4, dim=-1)
        c = f * c + i * g
        h = o * c.tanh()
        h = h if w_hr is None else linear(h, w_hr)
        yield gates, c, h


class Reference(nn.LSTM):
    """nn.LSTM without dropout, built on lstm_steps. Its own error in a dtype is part of the rule in tolerance.py.

    As with the kernels, the matmuls outside the time loop are in the weights' dtype, one for all steps and both
    directions; the loop itself is in float32, or float64.
    """

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Accepts every layout of input and hx that nn.LSTM does, and returns the same."""
        if isinstance(input, PackedSequence):
            x, lengths = pad_packed_sequence(input)
            y, h_n, c_n = self._stack(x, hx, lengths)
            if input.sorted_indices is not None:
                y, lengths = y[:, input.sorted_indices], lengths[input.sorted_indices.cpu()]
            return input._replace(data=pack_padded_sequence(y, lengths).data), (h_n, c_n)
        if input.dim() == 2:
            y, h_n, c_n = self._stack(input.unsqueeze(1), hx and [state.unsqueeze(1) for state in hx])
            return y.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        y, h_n, c_n = self._stack(input.transpose(0, 1) if self.batch_first else input, hx)
        return y.transpose(0, 1) if self.batch_first else y, (h_n, c_n)

    def _stack(self, x: Tensor, hx: Any, lengths: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """All layers: x (T, B, I) -> y (T, B, ..), h_n and c_n. lengths (B,): rows beyond them are padding."""
        directions = 2 if self.bidirectional else 1
        if hx is None:
            rows = self.num_layers * directions, x.shape[1]
            hx = x.new_zeros(*rows, self.proj_size or self.hidden_size), x.new_zeros(*rows, self.hidden_size)
        present = None if lengths is None else (torch.arange(len(x)).unsqueeze(1) < lengths).unsqueeze(2).to(x.device)
        states: list[tuple[Tensor, Tensor]] = []
        for _ in range(self.num_layers):
            groups = self.all_weights[len(states) : len(states) + directions]
            bias = torch.cat([group[2] + group[3] for group in groups]) if self.bias else None
            xg = linear(x, torch.cat([group[0] for group in groups]), bias)
            outputs: list[Tensor] = []
            for d, (group, part) in enumerate(zip(groups, xg.chunk(directions, -1), strict=True)):
                h0, c0 = (state[len(states)] for state in hx)
                w_hr = group[-1] if self.proj_size else None
                y, h, c = self._direction(part, h0, c0, group[1], w_hr, present, against_time=d == 1)
                outputs.append(y)
                states.append((h, c))
            x = torch.cat(outputs, -1)
        h_n, c_n = map(torch.stack, zip(*states, strict=True))
        return x, h_n, c_n

    @staticmethod
    def _direction(
        xg: Tensor,
        h: Tensor,
        c: Tensor,
        w_hh: Tensor,
        w_hr: Tensor | None,
        present: Tensor | None,
        *,
        against_time: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer and direction: y (T, B, P or H), h_n and c_n. present (T, B, 1): which rows are not padding."""
        dtype, wide = xg.dtype, torch.promote_types(xg.dtype, torch.float32)
        xg, h, c, w_hh = (t.to(wide) for t in (xg, h, c, w_hh))
        w_hr = None if w_hr is None else w_hr.to(wide)
        y = []
        steps = range(len(xg))
        for t in reversed(steps) if against_time else steps:
            [(_, c_t, h_t)] = lstm_steps([xg[t]], h, c, None, w_hh, w_hr=w_hr)
            if present is not None:
                c_t, h_t = torch.where(present[t], c_t, c), torch.where(present[t], h_t, h)
            c, h = c_t, h_t
            y.append(h)
        return torch.stack(y[::-1] if against_time else y).to(dtype), h.to(dtype), c.to(dtype)
