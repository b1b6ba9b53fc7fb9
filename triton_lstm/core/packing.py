"""The indexing of a layer's rows, which are dense or packed.

dense   (T, B, F): every sequence has T steps; starts and lengths are None.
packed  (N, F): PackedSequence's data. The sequences are sorted by length, longest first; step t has the rows
        starts[t] to starts[t + 1], one for each sequence that has not ended.

With D directions of time the features F are D equal parts; the second one runs against time.

resets, (T, B) or (N,) bool, is True for the rows that begin a segment: between such a row and the one before it in its
sequence, no direction of time hands a state on. First rows begin one anyway: for them it means nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

Index = torch.Tensor | None


class Rows(NamedTuple):
    """How the rows of a call's input are arranged.

    batch_first: (B, T) instead of (T, B). batch_sizes: a PackedSequence's, whose rows are packed. resets: which rows
    begin a segment, (T, B), (B, T) or packed as the input. segments: a Segments, to run them side by side.
    """

    batch_first: bool = False
    batch_sizes: torch.Tensor | None = None
    resets: torch.Tensor | None = None
    segments: Any = None

    @property
    def plain(self) -> bool:
        """Whether they are what PyTorch's LSTM takes and was measured on."""
        return self.batch_sizes is None and self.resets is None and self.segments is None

    @property
    def transposed(self) -> bool:
        return self.batch_first and self.batch_sizes is None


# Made once, as every call has one; no tuple of both, into whose item torch.compile of PyTorch 2.11 cannot look
DENSE = Rows()
DENSE_BATCH_FIRST = Rows(batch_first=True)


def refuse_capture(device: torch.device) -> None:
    """Raises RuntimeError during the capture of a CUDA graph: batch_sizes is on the CPU, so a replay could not change
    it."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "packed input and lengths cannot be captured in a CUDA graph, nor cu_seqlens on the CPU and resets on "
            "PyTorch's path: the batch size of each step is read on the CPU at every call. Capture padded input "
            "without lengths, cu_seqlens on the GPU, and resets where the kernels can run."
        )


def starts_and_lengths(batch_sizes: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """PackedSequence's batch_sizes (T,) -> starts (T + 2,) int64, lengths (B,) int32, both on `device`.

    starts ends with N twice: step T has no rows.
    """
    refuse_capture(device)
    ends = batch_sizes.cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends, ends[-1:]])
    sequences = torch.arange(int(batch_sizes[0]), device=batch_sizes.device)  # not on the default device
    lengths = len(batch_sizes) - torch.searchsorted(batch_sizes.flip(0), sequences, right=True)  # steps with more rows
    return starts.to(device, non_blocking=True), lengths.to(device, torch.int32, non_blocking=True)


def batch_sizes_of(starts: Index) -> list[int] | None:
    """The number of rows of each step, on the host; None for dense data."""
    return None if starts is None else starts.diff()[:-1].tolist()


def side_by_side(state: torch.Tensor) -> torch.Tensor:
    """(D, B, F) -> (B, D*F)."""
    return state.transpose(0, 1).flatten(1)


def first_rows(data: torch.Tensor, directions: int, starts: Index, lengths: Index) -> torch.Tensor:
    """(B, F): the rows that each direction of time processes first."""
    forward, *against = data.chunk(directions, -1)
    parts = [_begin(forward, lengths), *(_end(part, starts, lengths) for part in against)]
    return torch.cat(parts, -1) if against else parts[0].clone()


def last_rows(data: torch.Tensor, directions: int, starts: Index, lengths: Index) -> torch.Tensor:
    """(D, B, F/D): a copy of the rows that each direction of time processes last."""
    forward, *against = data.chunk(directions, -1)
    return stacked([_end(forward, starts, lengths), *(_begin(part, lengths) for part in against)])


def stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """torch.stack, but not as a view of a concatenation, which an operator must not return."""
    return torch.cat([part.unsqueeze(0) for part in parts])


def add_to_first_rows(data: torch.Tensor, added: torch.Tensor, directions: int, starts: Index, lengths: Index) -> None:
    """Adds (B, F) in place to the rows that each direction of time processes first."""
    width = added.shape[-1] // directions
    _begin(data, lengths)[..., :width] += added[:, :width]
    if directions == 1:
        return
    if starts is None or lengths is None:
        data[-1, :, width:] += added[:, width:]
    else:
        data[:, width:].index_add_(0, _last_of_each(starts, lengths), added[:, width:])


def with_first_rows(
    data: torch.Tensor, added: torch.Tensor, directions: int, starts: Index, lengths: Index
) -> torch.Tensor:
    """add_to_first_rows out of place: for autograd, torch.func, and exporters, which know no changes of views."""
    (ahead, share), *against = zip(data.chunk(directions, -1), added.chunk(directions, -1), strict=True)
    if starts is None or lengths is None:
        parts = [torch.cat([ahead[:1] + share, ahead[1:]])]
        parts += [torch.cat([back[:-1], back[-1:] + of_back]) for back, of_back in against]
    else:
        parts = [torch.cat([ahead[: lengths.shape[0]] + share, ahead[lengths.shape[0] :]])]
        parts += [back.index_add(0, _last_of_each(starts, lengths), of_back) for back, of_back in against]
    return torch.cat(parts, -1) if against else parts[0]


def add_to_last_rows(data: torch.Tensor, added: torch.Tensor, starts: Index, *, against_time: bool) -> None:
    """Adds (B, F) in place to the rows that one direction of time processes last; data: its features only."""
    batch = added.shape[0]
    if starts is None:
        data[0 if against_time else -1] += added
    elif against_time:
        data[:batch] += added
    else:
        lengths = (starts.diff()[:-1, None] > torch.arange(batch, device=starts.device)).sum(0)
        data.index_add_(0, _last_of_each(starts, lengths), added.to(data.dtype))


def _begin(data: torch.Tensor, lengths: Index) -> torch.Tensor:
    return data[0] if lengths is None else data[: lengths.shape[0]]


def _end(data: torch.Tensor, starts: Index, lengths: Index) -> torch.Tensor:
    if starts is None or lengths is None:
        return data[-1]
    return data.index_select(0, _last_of_each(starts, lengths))


def _last_of_each(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The row of each sequence's last step."""
    return starts[lengths.long() - 1] + torch.arange(lengths.shape[0], device=lengths.device)


def successions(
    later: torch.Tensor,
    earlier: torch.Tensor,
    starts: Index,
    lengths: Index,
    resets: Index = None,
    *,
    against_time: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of both tensors, each (M, F), paired so that that of `earlier` is processed just before that of `later`.

    later, earlier: one direction's features of dense or packed data. If a row of `later` has no predecessor, that of
    `earlier` is zero or the pair is omitted.
    """
    if starts is None or lengths is None:
        batch, later, earlier = later.shape[1], later.flatten(0, -2), earlier.flatten(0, -2)
        ahead, behind = (
            slice(batch, None),
            slice(None, later.shape[0] - batch),
        )  # not len(): a compiler would take it for a constant
        now, before = (behind, ahead) if against_time else (ahead, behind)
        return later[now], _unless_reset(earlier[before], None if resets is None else resets.flatten()[ahead])
    batch, one_step_ago = lengths.shape[0], _one_step_ago(starts, lengths, later.shape[0])
    begins = None if resets is None else resets[batch:]
    if against_time:
        moved = torch.zeros_like(earlier, memory_format=torch.contiguous_format)
        return later, moved.index_copy_(0, one_step_ago, _unless_reset(earlier[batch:], begins))
    return later[batch:], _unless_reset(earlier.index_select(0, one_step_ago), begins)


def _unless_reset(rows: torch.Tensor, begins: Index) -> torch.Tensor:
    """`rows`, zero where a segment `begins` between them and their partners: no product, which NaN would survive."""
    return rows if begins is None else torch.where(begins.unsqueeze(-1), 0.0, rows)


def add_to_predecessors(
    data: torch.Tensor,
    added: torch.Tensor,
    starts: Index,
    lengths: Index,
    resets: Index = None,
    *,
    against_time: bool,
) -> None:
    """Adds each row of `added` in place to the row of `data` that is processed just before it, if any.

    data, added: one direction's features of dense or packed data, of one dtype.
    """
    if starts is None or lengths is None:
        now, before = (slice(None, -1), slice(1, None)) if against_time else (slice(1, None), slice(None, -1))
        data[before] += _unless_reset(added[now], None if resets is None else resets[1:])
        return
    batch, one_step_ago = lengths.shape[0], _one_step_ago(starts, lengths, data.shape[0])
    begins = None if resets is None else resets[batch:]
    if against_time:
        data[batch:] += _unless_reset(added.index_select(0, one_step_ago), begins)
    else:
        data.index_add_(0, one_step_ago, _unless_reset(added[batch:], begins))


def _one_step_ago(starts: torch.Tensor, lengths: torch.Tensor, rows: int) -> torch.Tensor:
    """For each of the rows after step 0, the row of the same sequence one step before."""
    sizes, batch = starts.diff()[:-1], lengths.shape[0]
    shift = torch.repeat_interleave(sizes[:-1], sizes[1:], output_size=rows - batch)
    return torch.arange(batch, rows, device=starts.device) - shift
