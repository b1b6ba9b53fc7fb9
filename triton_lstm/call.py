"""What a call of the module takes and returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, overload

import torch
from torch.nn.utils.rnn import PackedSequence


class LayerStates(NamedTuple):
    """What a layer computed at every step: c[t] and the activated gates i, f, g, o.

    Each has the output's rows and D*H features, the directions side by side; gradients flow through all of them.
    """

    c: torch.Tensor
    i: torch.Tensor
    f: torch.Tensor
    g: torch.Tensor
    o: torch.Tensor


class PackedLayerStates(NamedTuple):
    """LayerStates of a call with a PackedSequence, each one packed as well."""

    c: PackedSequence
    i: PackedSequence
    f: PackedSequence
    g: PackedSequence
    o: PackedSequence


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
