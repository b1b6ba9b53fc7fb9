"""The types of a call of the module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, overload

import torch
from torch.nn.utils.rnn import PackedSequence


class LayerStates(NamedTuple):
    r"""The cell states and activated gates of one layer at every time step, from a call with return_states=True.

    .. math::
        i_t, f_t, o_t &= \sigma(a^i_t), \sigma(a^f_t), \sigma(a^o_t), \quad g_t = \tanh(a^g_t) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t

    Attributes:
        c, i, f, g, o: (T, B, D*H), (B, T, D*H) with batch_first, or (T, D*H) unbatched, with the directions
            concatenated as in the output; of the output's dtype. All are differentiable.

    Example::

        import torch
        import triton_lstm

        lstm = triton_lstm.LSTM(8, 16, num_layers=2)
        output, (h_n, c_n), layers = lstm(torch.randn(5, 2, 8), return_states=True)
        last = layers[-1]
        torch.testing.assert_close(last.o * last.c.tanh(), output)
    """

    c: torch.Tensor
    i: torch.Tensor
    f: torch.Tensor
    g: torch.Tensor
    o: torch.Tensor


class PackedLayerStates(NamedTuple):
    """The `LayerStates` of a call with a PackedSequence; each of them is a PackedSequence as well.

    Attributes:
        c, i, f, g, o: PackedSequence with data (N, D*H) of the output's dtype, batch sizes and indices as the input's.

    Example::

        import torch
        import triton_lstm
        from torch.nn.utils.rnn import pack_sequence

        lstm = triton_lstm.LSTM(8, 16)
        packed = pack_sequence([torch.randn(5, 8), torch.randn(3, 8)])
        output, (h_n, c_n), layers = lstm(packed, return_states=True)
        print(layers[0].c.data.shape)  # (8, 16)
    """

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
        resets: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | Sequence[int] | None = None,
        return_states: Literal[False] = False,
    ) -> tuple[torch.Tensor, _States]: ...

    @overload
    def __call__(
        self,
        input: torch.Tensor,
        hx: Sequence[torch.Tensor] | None = None,
        *,
        lengths: torch.Tensor | Sequence[int] | None = None,
        resets: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | Sequence[int] | None = None,
        return_states: Literal[True],
    ) -> tuple[torch.Tensor, _States, list[LayerStates]]: ...

    @overload
    def __call__(
        self,
        input: torch.Tensor,
        hx: Sequence[torch.Tensor] | None = None,
        *,
        lengths: torch.Tensor | Sequence[int] | None = None,
        resets: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | Sequence[int] | None = None,
        return_states: bool,
    ) -> tuple[torch.Tensor, _States] | tuple[torch.Tensor, _States, list[LayerStates]]: ...

    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: Sequence[torch.Tensor] | None = None,
        *,
        lengths: None = None,
        resets: torch.Tensor | None = None,
        cu_seqlens: None = None,
        return_states: Literal[False] = False,
    ) -> tuple[PackedSequence, _States]: ...

    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: Sequence[torch.Tensor] | None = None,
        *,
        lengths: None = None,
        resets: torch.Tensor | None = None,
        cu_seqlens: None = None,
        return_states: Literal[True],
    ) -> tuple[PackedSequence, _States, list[PackedLayerStates]]: ...

    @overload
    def __call__(
        self,
        input: PackedSequence,
        hx: Sequence[torch.Tensor] | None = None,
        *,
        lengths: None = None,
        resets: torch.Tensor | None = None,
        cu_seqlens: None = None,
        return_states: bool,
    ) -> tuple[PackedSequence, _States] | tuple[PackedSequence, _States, list[PackedLayerStates]]: ...
