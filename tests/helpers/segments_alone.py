"""What resets mean: each segment of each sequence run alone, one call of nn.LSTM for each."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

Tensor = torch.Tensor


def alone(module: nn.RNNBase, x: Any, hx: Any, resets: Tensor, lengths: list[int] | None = None) -> Any:
    """(output, (h_n, c_n)) as module(x, hx, resets=resets) has them; resets laid out as x.

    lengths: of a padded batch.
    """
    if isinstance(x, PackedSequence):
        padded, counts = pad_packed_sequence(x)
        row = torch.arange(len(resets), device=resets.device)
        (of_rows, _), (places, _) = (pad_packed_sequence(x._replace(data=t)) for t in (resets, row))
        hx = hx and tuple(state.to(padded) for state in hx)
        if module.batch_first:
            padded, of_rows = padded.transpose(0, 1), of_rows.transpose(0, 1)
        output, states = alone(module, padded, hx, of_rows, counts.tolist())
        output = output.transpose(0, 1) if module.batch_first else output
        there = (torch.arange(len(output))[:, None] < counts).to(output.device)
        return x._replace(data=output[there][places[there].argsort()]), states
    if x.dim() == 2:
        dim = 0 if module.batch_first else 1
        states = hx and tuple(state.unsqueeze(1) for state in hx)
        output, states = alone(module, x.unsqueeze(dim), states, resets.unsqueeze(dim))
        return output.squeeze(dim), tuple(state.squeeze(1) for state in states)
    steps = x.transpose(0, 1) if module.batch_first else x
    resets = (resets.t() if module.batch_first else resets).cpu()
    lengths = lengths or [len(steps)] * steps.shape[1]
    columns = [
        _sequence(module, steps[:n, [b]], None if hx is None else [state[:, [b]] for state in hx], resets[:n, b])
        for b, n in enumerate(lengths)
    ]
    rows = [torch.cat([y, y.new_zeros(len(steps) - len(y), *y.shape[1:])]) for y, _ in columns]
    output = torch.cat(rows, 1)
    states = tuple(torch.cat([pair[k] for _, pair in columns], 1) for k in (0, 1))
    return output.transpose(0, 1) if module.batch_first else output, states


def _sequence(module: nn.RNNBase, x: Tensor, hx: list[Tensor] | None, resets: Tensor) -> tuple[Tensor, list[Tensor]]:
    """One sequence (T, 1, I), its segments in turn."""
    directions = 2 if module.bidirectional else 1
    begins = [0, *(t for t in range(1, len(x)) if resets[t])]
    results = []
    for begin, end in zip(begins, [*begins[1:], len(x)], strict=True):
        states = None
        if hx is not None:
            wanted = [begin == 0 and not resets[0], end == len(x)][:directions] * module.num_layers
            kept = torch.tensor(wanted, device=x.device).view(-1, 1, 1)
            states = tuple(torch.where(kept, given, 0) for given in hx)
        segment = x[begin:end]
        results.append(module(segment.transpose(0, 1) if module.batch_first else segment, states))
    y = torch.cat([y.transpose(0, 1) if module.batch_first else y for y, _ in results])
    last = [state.clone() for state in results[-1][1]]
    if directions == 2:
        for state, of_first in zip(last, results[0][1], strict=True):
            state[1::2] = of_first[1::2]
    return y, last
