"""Where a sequence's rows lie among the rows of a layer's data, which are dense or packed.

dense   (T, B, F): every sequence has T steps; starts and lengths are None.
packed  (N, F): PackedSequence's data. The sequences are in order of length, the longest first; step t has the rows
        starts[t] to starts[t + 1], one for each sequence that is not over.

With D directions of time the features F are D equal parts; the second one goes against time.
"""

from __future__ import annotations

import torch

Index = torch.Tensor | None


def starts_and_lengths(batch_sizes: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """PackedSequence's batch_sizes (T,) -> starts (T + 2,) int64, lengths (B,) int32, both on `device`.

    starts ends with N twice: step T has no rows.
    """
    ends = batch_sizes.cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends, ends[-1:]])
    sequences = torch.arange(int(batch_sizes[0]))
    lengths = (batch_sizes[None, :] > sequences[:, None]).sum(1)
    return starts.to(device), lengths.to(device, torch.int32)


def batch_sizes_of(starts: Index) -> list[int] | None:
    """The rows of every step, on the host; None for dense data."""
    return None if starts is None else starts.diff()[:-1].tolist()


def outermost(data: torch.Tensor, batch: int, starts: Index, lengths: Index) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows, each (B,) int64, at which the sequences begin and end, of `data`'s rows flattened."""
    sequences = torch.arange(batch, device=data.device)
    if starts is None or lengths is None:
        return sequences, sequences + (data.shape[0] - 1) * batch
    return sequences, sequences + starts[lengths.long() - 1]


def first_rows(data: torch.Tensor, directions: int, batch: int, starts: Index, lengths: Index) -> torch.Tensor:
    """(B, F): what each direction of time processes first."""
    begin, end = outermost(data, batch, starts, lengths)
    parts = data.flatten(0, -2).chunk(directions, -1)
    return torch.cat([part.index_select(0, rows) for part, rows in zip(parts, (begin, end), strict=False)], -1)


def last_rows(data: torch.Tensor, directions: int, batch: int, starts: Index, lengths: Index) -> torch.Tensor:
    """(B, F): what each direction of time processes last."""
    begin, end = outermost(data, batch, starts, lengths)
    parts = data.flatten(0, -2).chunk(directions, -1)
    return torch.cat([part.index_select(0, rows) for part, rows in zip(parts, (end, begin), strict=False)], -1)


def add_to_first_rows(data: torch.Tensor, added: torch.Tensor, directions: int, starts: Index, lengths: Index) -> None:
    """Adds (B, F) in place to what each direction of time processes first."""
    begin, end = outermost(data, added.shape[0], starts, lengths)
    width = added.shape[-1] // directions
    for d, rows in zip(range(directions), (begin, end), strict=False):
        features = slice(d * width, (d + 1) * width)
        data.view(-1, data.shape[-1])[:, features].index_add_(0, rows, added[:, features])


def successions(
    later: torch.Tensor, earlier: torch.Tensor, batch: int, starts: Index, *, against_time: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors' rows, each (M, F), paired so that `earlier`'s is the one processed just before `later`'s.

    later, earlier: one direction's features of dense or packed data. Where a row of a packed `later` has none before
    it, `earlier`'s is zero or the pair is left out.
    """
    if starts is None:
        now, before = (slice(None, -1), slice(1, None)) if against_time else (slice(1, None), slice(None, -1))
        return later[now].flatten(0, -2), earlier[before].flatten(0, -2)
    sizes = starts.diff()[:-1]
    rest = later.shape[0] - batch
    shift = torch.repeat_interleave(sizes[:-1], sizes[1:], output_size=rest)
    one_step_ago = torch.arange(batch, batch + rest, device=later.device) - shift
    if against_time:
        moved = torch.zeros_like(earlier, memory_format=torch.contiguous_format)
        return later, moved.index_copy(0, one_step_ago, earlier[batch:])
    return later[batch:], earlier.index_select(0, one_step_ago)
