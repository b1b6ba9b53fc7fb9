"""PyTorch's own LSTM layer by layer, so that hooks can be called on each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from triton_lstm.core.checks import Group
from triton_lstm.core.packing import starts_and_lengths
from triton_lstm.operator.hooks import Hooks, active

Tensor = torch.Tensor


def hooked_lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    weights: list[Group],
    options: tuple[bool, int, float, bool, bool],
    batch_first: bool,
    batch_sizes: Tensor | None,
    hooks: Sequence[Hooks],
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.lstm layer by layer, which on the CPU gives the same bits, with hooks on every layer."""
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
        for hook in active(hooks[k]):
            y, h, c = hook.watch_layer((y, h, c), x, states, groups, starts)
        h_n.append(h)
        c_n.append(c)
        x = torch.nn.functional.dropout(y, dropout, True) if train and dropout and k < num_layers - 1 else y
    return x.transpose(0, 1) if transposed else x, torch.cat(h_n), torch.cat(c_n)
