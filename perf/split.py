"""nn.LSTM where states begin anew: sequences are split there and packed, as users of cuDNN have to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from triton_lstm.perf.cases import Case

SPLIT = "each call reads them, splits and packs the sequences, and puts the rows back"


class Split(nn.Module):
    """nn.LSTM, or the reference, on the packed segments of its input.

    Each call finds the segments on the device and reads their number and sizes, so the host waits for it twice. A batch
    without any goes to the module as it is.
    """

    def __init__(self, case: Case, inner: nn.LSTM) -> None:
        super().__init__()
        self.inner = inner
        self.resets: torch.Tensor
        self.register_buffer("resets", case.reset_rows().to(next(inner.parameters()).device))

    def forward(self, x: torch.Tensor) -> Any:
        by_sequence = self.resets if self.inner.batch_first else self.resets.t()
        (batch, steps), rows, device = by_sequence.shape, by_sequence.numel(), x.device
        begins = by_sequence.clone()
        begins[:, 0] = True
        begin = begins.flatten().nonzero().squeeze(1)
        if len(begin) == batch:
            return self.inner(x)
        lengths = begin.diff(append=begin.new_full((1,), rows))
        rank = lengths.argsort(descending=True).argsort()
        sizes = (lengths > torch.arange(steps, device=device).unsqueeze(1)).sum(1)  # segments with such a step
        segment = begins.flatten().cumsum(0) - 1  # of each row, sequence by sequence
        row = torch.arange(rows, device=device)
        place = (sizes.cumsum(0) - sizes)[row - begin[segment]] + rank[segment]
        if not self.inner.batch_first:
            place = place.view(batch, steps).t().flatten()
        order = torch.empty_like(place).scatter_(0, place, row)
        sizes = sizes.cpu()
        # Not index_select, whose gradient is added up by atomics
        packed = x.new_empty(rows, x.shape[2]).index_copy_(0, place, x.flatten(0, 1))
        y, states = self.inner(PackedSequence(packed, sizes[sizes > 0]))
        own = rank[segment].view(batch, steps)
        ends = [own[:, -1], own[:, 0]][: 2 if self.inner.bidirectional else 1]  # where each direction ends

        def of_sequences(state: torch.Tensor) -> torch.Tensor:
            parts = [state[d :: len(ends)].index_select(1, end) for d, end in enumerate(ends)]
            return torch.stack(parts, 1).flatten(0, 1)

        output = y.data.new_empty(y.data.shape).index_copy_(0, order, y.data)
        return output.unflatten(0, x.shape[:2]), tuple(map(of_sequences, states))


def in_segments(case: Case, module: nn.LSTM) -> nn.Module:
    """`module`, on packed segments if the case has resets."""
    return module if case.resets is None else Split(case, module)
