"""The layout of a call's input, for results that use the same one."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence


@dataclasses.dataclass(frozen=True)
class Layout:
    """(T, B, F), (B, T, F) if batch_first, (T, F) if not batched, or with batch_sizes and indices a PackedSequence,
    padded to padded_to steps if that is not None."""

    batched: bool = True
    batch_first: bool = False
    batch_sizes: torch.Tensor | None = None
    sorted_indices: torch.Tensor | None = None
    unsorted_indices: torch.Tensor | None = None
    padded_to: int | None = None

    def rows(self, data: torch.Tensor) -> Any:
        """Dense (T, B, F) or packed (N, F) rows in the user's layout."""
        if self.batch_sizes is not None:
            packed = PackedSequence(data, self.batch_sizes, self.sorted_indices, self.unsorted_indices)
            if self.padded_to is None:
                return packed
            return pad_packed_sequence(packed, self.batch_first, total_length=self.padded_to)[0]
        if not self.batched:
            return data.squeeze(1)
        return data.transpose(0, 1) if self.batch_first else data

    def state(self, state: torch.Tensor) -> torch.Tensor:
        """A state (B, F) in the user's layout: in the order of the user's sequences, (F,) if not batched."""
        if self.unsorted_indices is not None:
            state = state.index_select(0, self.unsorted_indices)
        return state if self.batched else state.squeeze(0)

    @property
    def lengths(self) -> torch.Tensor | None:
        """(B,) int64 on the CPU, the length of each of the user's sequences; None if all have T steps."""
        if self.batch_sizes is None:
            return None
        sequences = torch.arange(int(self.batch_sizes[0]), device="cpu")
        lengths = (self.batch_sizes.unsqueeze(1) > sequences).sum(0)
        return lengths if self.unsorted_indices is None else lengths[self.unsorted_indices.cpu()]
