"""What a call of the module takes and returns, for type checkers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, overload

import torch
from torch.nn.utils.rnn import PackedSequence

from triton_lstm.functional import LayerStates, PackedLayerStates

_States = tuple[torch.Tensor, torch.Tensor]  # h_n and c_n


class Call(Protocol):
    """LSTM.forward and LSTM.__call__."""

    @overload
    def __call__(
        self,
        input: torch.Tensor,
        hx: Sequence[torch.Tensor] | None = None,
        *,
        lengths: torch.Tensor | Sequence[int] | None = None,
        return_states: Literal[False] = False,
    ) -> tuple[torch.Tensor, _States]: ...

    @overload
    def __call__(
        self,
        input: torch.Tensor,
        hx: Sequence[torch.Tensor] | None = None,
        *,
        lengths: torch.Tensor | Sequence[int] | None = None,
        return_states: Literal[True],
    ) -> tuple[torch.Tensor, _States, list[LayerStates]]: ...

    @overload
    def __call__(
        self,
        input: torch.Tensor,
        hx: Sequence[torch.Tensor] | None = None,
        *,
        lengths: torch.Tensor | Sequence[int] | None = None,
        return_states: bool,
    ) -> tuple[torch.Tensor, _States] | tuple[torch.Tensor, _States, list[LayerStates]]: ...

    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: Sequence[torch.Tensor] | None = None,
        *,
        lengths: None = None,
        return_states: Literal[False] = False,
    ) -> tuple[PackedSequence, _States]: ...

    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: Sequence[torch.Tensor] | None = None,
        *,
        lengths: None = None,
        return_states: Literal[True],
    ) -> tuple[PackedSequence, _States, list[PackedLayerStates]]: ...

    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: Sequence[torch.Tensor] | None = None,
        *,
        lengths: None = None,
        return_states: bool,
    ) -> tuple[PackedSequence, _States] | tuple[PackedSequence, _States, list[PackedLayerStates]]: ...
