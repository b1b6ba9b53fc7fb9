"""Segments of sequences, in which the state begins anew: as resets, or as the sequences of a packed batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from triton_lstm.core.checks import check_cu_seqlens, check_documents, check_resets
from triton_lstm.core.packing import Rows, refuse_capture

Tensor = torch.Tensor


class Segments(NamedTuple):
    """Dense or packed rows as packed rows of their segments, which run side by side.

    order (N,): the row of the data that is at each place among the segments' rows; places (N,): the inverse.
    batch_sizes: of the segments, as a PackedSequence's. number: how many they are.
    first, last (B,): the segment with each sequence's first step, and the one with its last step.
    """

    order: Tensor
    places: Tensor
    batch_sizes: Tensor
    number: int
    first: Tensor
    last: Tensor

    def run(self, run: Callable[[Tensor, Any], Sequence[Any]], x: Tensor, hx: Any, directions: int) -> tuple[Any, ...]:
        """y, h_n, c_n and every layer's states, if it returns them, of `run` on packed rows and hx, as of x and hx.

        x: (T, B, F), or packed (N, F); hx: h0 and c0 (L*D, B, F), or None. A direction of time has them in the segment
        that it begins with, and ends with the states of its last one.
        """
        leading = x.shape[:-1]
        spread = None if hx is None else [self._spread(state, directions) for state in hx]
        y, h_n, c_n, *states = run(self.packed(x), spread)
        states = [[type(layer)(*(self.unpacked(t, leading) for t in layer)) for layer in layers] for layers in states]
        ends = self._collected(h_n, directions), self._collected(c_n, directions)
        return self.unpacked(y, leading), *ends, *states

    def packed(self, x: Tensor) -> Tensor:
        """The rows (N, F) of x in the order of the segments."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self.order)

    def unpacked(self, rows: Tensor, leading: Sequence[int]) -> Tensor:
        """And back: (*leading, F)."""
        return rows.index_select(0, self.places).unflatten(0, leading)

    def _spread(self, state: Tensor, directions: int) -> Tensor:
        """(L*D, B, F) -> (L*D, segments, F), zero in those that no direction of time begins with."""
        parts = []
        for d, begin in enumerate((self.first, self.last)[:directions]):
            own = state[d::directions]
            parts.append(own.new_zeros(own.shape[0], self.number, own.shape[2]).index_copy(1, begin, own))
        return parts[0] if directions == 1 else torch.stack(parts, 1).flatten(0, 1)

    def _collected(self, state: Tensor, directions: int) -> Tensor:
        """(L*D, segments, F) -> (L*D, B, F), of the segments that each direction of time ends with."""
        ends = (self.last, self.first)[:directions]
        parts = [state[d::directions].index_select(1, end) for d, end in enumerate(ends)]
        return parts[0] if directions == 1 else torch.stack(parts, 1).flatten(0, 1)


def segments_of(resets: Tensor, batch_sizes: Tensor | None, device: torch.device) -> Segments:
    """The segments of dense rows, resets (T, B), or of packed ones, resets (N,); for data on `device`.

    Reads the resets on the CPU, where batch_sizes are.
    """
    refuse_capture(device)
    resets = resets.cpu()
    rows = resets.numel()
    row = torch.arange(rows, device="cpu")
    if batch_sizes is None:
        steps, batch = resets.shape
        by_sequence = row.view(steps, batch).t().flatten()
        first = row[::steps]  # of each sequence's rows, which are sequence by sequence from here on
    else:
        steps, batch = len(batch_sizes), int(batch_sizes[0])
        step = torch.repeat_interleave(batch_sizes)
        by_sequence = torch.argsort((row - (batch_sizes.cumsum(0) - batch_sizes)[step]) * steps + step)
        first = (by_sequence < batch).nonzero().squeeze(1)
    begins = resets.flatten()[by_sequence]
    begins[first] = True
    segment = begins.cumsum(0) - 1
    begin = begins.nonzero().squeeze(1)
    lengths = begin.diff(append=row.new_tensor([rows]))
    sorted_lengths, longest_first = lengths.sort(descending=True, stable=True)
    count = len(lengths)
    rank = torch.empty_like(longest_first)
    rank[longest_first] = row[:count]
    longest = row[: int(sorted_lengths[0])]
    sizes = count - torch.searchsorted(sorted_lengths.flip(0), longest, right=True)  # segments that have such a step
    places, order = torch.empty_like(row), torch.empty_like(row)
    places[by_sequence] = (sizes.cumsum(0) - sizes)[row - begin[segment]] + rank[segment]
    order[places] = row
    last = first.roll(-1) - 1  # -1: the last one of all
    indices = torch.cat([order, places, rank[segment[first]], rank[segment[last]]]).to(device, non_blocking=True)
    order, places, first, last = indices.split([rows, rows, batch, batch])
    return Segments(order, places, sizes, count, first, last)


def resets_at(cu_seqlens: Tensor, steps: int) -> Tensor:
    """cu_seqlens (documents + 1,) -> (T,) bool, True where a document begins that is not the first; on its device.

    Nothing is read on the CPU, so that cu_seqlens that are wrong give wrong resets, but no access outside of a tensor.
    """
    steps_there = torch.arange(steps, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, steps_there, right=True)
    return document != torch.cat([document[:1], document[:-1]])


def arranged(
    input: Tensor, rows: Rows, resets: Tensor | None, cu_seqlens: Any, *, known: bool, side_by_side: bool = True
) -> Rows:
    """`rows` of a batched input, with its segments.

    known: whether values on the CPU may be looked at; side_by_side: whether documents may run so where they are.

    Raises TypeError, ValueError or RuntimeError for resets or cu_seqlens that do not fit the input.
    """
    if cu_seqlens is None:
        return rows if resets is None else rows._replace(resets=check_resets(resets, input))
    if resets is not None or rows.batch_sizes is not None:
        other = "packed rows" if resets is None else "resets"
        raise ValueError(f"cu_seqlens goes with a batch of one sequence, and not with {other}")
    batch, steps = input.shape[:2] if rows.batch_first else (input.shape[1], input.shape[0])
    cu_seqlens = check_cu_seqlens(cu_seqlens, batch)
    known = known and cu_seqlens.device.type == "cpu"
    if known:
        check_documents(cu_seqlens, steps)
    if not (known and side_by_side):
        return rows._replace(resets=resets_at(cu_seqlens.to(input.device), steps).view(input.shape[:-1]))
    resets = resets_at(cu_seqlens, steps)
    if not resets.any():
        return rows
    return rows._replace(segments=segments_of(resets.unsqueeze(1), None, input.device))


def without_reset(hx: Sequence[Tensor], resets: Tensor, directions: int) -> list[Tensor]:
    """h0 and c0 (L*D, B, F), zero in the forward direction of the sequences that `resets` (B,) of their first step say
    to begin anew."""
    anew = resets.view(1, -1, 1)
    if directions == 2:
        anew = anew & (torch.arange(hx[0].shape[0], device=resets.device) % 2 == 0).view(-1, 1, 1)
    return [torch.where(anew, 0.0, state) for state in hx]


def refuse_in_onnx(resets: Tensor | None) -> None:
    """Raises RuntimeError unless there are none."""
    if resets is not None:
        raise RuntimeError(
            "ONNX's LSTM operator has no resets: an LSTM that is given resets or cu_seqlens cannot be exported there. "
            "Export one that is called for one segment at a time, with hx and the states that it returned"
        )
