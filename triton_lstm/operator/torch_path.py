"""PyTorch's own LSTM: of segments, and layer by layer, so that hooks can be called on each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from triton_lstm.core.checks import Group
from triton_lstm.core.packing import Rows, starts_and_lengths
from triton_lstm.core.segments import Segments, segments_of
from triton_lstm.operator.hooks import Hooks, active

Tensor = torch.Tensor


def lstm_of_segments(
    x: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    options: tuple[bool, int, float, bool, bool],
    segments: Segments,
) -> tuple[Tensor, ...]:
    """torch.lstm, once, on dense rows (T, B, I) or packed ones (N, I) split into segments, which are packed."""
    lstm: Any = torch.lstm
    kind = x.device.type
    if kind == "cpu" and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        # PyTorch's autocast knows the LSTM of dense rows only there
        dtype = torch.get_autocast_dtype(kind)
        x, hx, params = x.to(dtype), [state.to(dtype) for state in hx], [weight.to(dtype) for weight in params]

    def run(rows: Tensor, states: list[Tensor]) -> Sequence[Any]:
        results: Sequence[Any] = lstm(rows, segments.batch_sizes, states, params, *options)
        return results

    return segments.run(run, x, hx, 2 if options[-1] else 1)


def hooked_lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    weights: list[Group],
    options: tuple[bool, int, float, bool, bool],
    arrangement: Rows,
    hooks: Sequence[Hooks],
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.lstm layer by layer, which on the CPU gives the same bits, with hooks on every layer."""
    has_biases, num_layers, dropout, train, bidirectional = options
    batch_sizes, resets = arrangement.batch_sizes, arrangement.resets
    directions = 2 if bidirectional else 1
    x = input.transpose(0, 1) if arrangement.transposed else input
    starts = None if batch_sizes is None else starts_and_lengths(batch_sizes, x.device)[0]
    segments = None if resets is None else segments_of(resets, batch_sizes, x.device)
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
        if segments is not None:
            y, h, c = lstm_of_segments(x, states, params, one_layer, segments)
        elif batch_sizes is None:
            y, h, c = torch.lstm(x, states, params, *one_layer, False)
        else:
            y, h, c = torch.lstm(x, batch_sizes, states, params, *one_layer)
        for hook in active(hooks[k]):
            y, h, c = hook.watch_layer((y, h, c), x, states, groups, starts, resets)
        h_n.append(h)
        c_n.append(c)
        x = y
        if train and dropout and k < num_layers - 1:
            rows_of_y = y if segments is None else segments.packed(y)  # as torch.lstm has them when it draws
            dropped = torch.nn.functional.dropout(rows_of_y, dropout, True)
            x = dropped if segments is None else segments.unpacked(dropped, y.shape[:-1])
    return x.transpose(0, 1) if arrangement.transposed else x, torch.cat(h_n), torch.cat(c_n)
