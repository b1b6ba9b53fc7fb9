"""lstm(): torch.lstm's arguments, for a stack of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from triton_lstm.backend import Backend
from triton_lstm.call import LayerStates
from triton_lstm.stack import stack

_Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@overload
def lstm(
    input: torch.Tensor,
    hx: Sequence[torch.Tensor] | None,
    params: Sequence[torch.Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    batch_sizes: torch.Tensor | None = None,
    recompute: bool = False,
    return_states: Literal[False] = False,
    backend: Backend | None = None,
) -> _Results: ...


@overload
def lstm(
    input: torch.Tensor,
    hx: Sequence[torch.Tensor] | None,
    params: Sequence[torch.Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    batch_sizes: torch.Tensor | None = None,
    recompute: bool = False,
    return_states: Literal[True],
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[LayerStates]]: ...


@overload
def lstm(
    input: torch.Tensor,
    hx: Sequence[torch.Tensor] | None,
    params: Sequence[torch.Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    batch_sizes: torch.Tensor | None = None,
    recompute: bool = False,
    return_states: bool,
    backend: Backend | None = None,
) -> _Results | tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[LayerStates]]: ...


def lstm(
    input: torch.Tensor,
    hx: Sequence[torch.Tensor] | None,
    params: Sequence[torch.Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    batch_sizes: torch.Tensor | None = None,
    recompute: bool = False,
    return_states: bool = False,
    backend: Backend | None = None,
) -> Any:
    """A stack of LSTM layers, with torch.lstm's arguments in torch.lstm's order.

    Args:
        input: (T, B, I), or (B, T, I) with `batch_first`; float32, bfloat16, float16 (float64 off the kernels). With
            `batch_sizes` a PackedSequence's data (N, I).
        hx: h0 (L*D, B, P or H) and c0 (L*D, B, H), or None for zeros. L layers, D directions.
        params: nn.LSTM's weights in nn.LSTM's order: for each layer, for each direction inside it, weight_ih (4H, ..),
            weight_hh (4H, P or H), if `has_biases` bias_ih and bias_hh (4H,), and with a projection weight_hr (P, H).
        dropout: probability for every layer's output but the last one's; only if `train`.
        batch_sizes: a PackedSequence's, (T,) int64 on the CPU; hx and its results are in the order of the packed rows.
        recompute: keep only the output and c for the backward pass, which makes the gates again in one product.
        return_states: also return every layer's c and gates.
        backend: "auto", "triton" or "torch"; None reads TRITON_LSTM_BACKEND.

    Returns:
        output (T, B, D*(P or H)), its transpose with `batch_first` or packed (N, D*(P or H)); h_n and c_n (shaped as h0
        and c0); with `return_states` a list with the LayerStates of every layer.

    Raises:
        TypeError: params that are no tensors.
        ValueError: an unknown backend; params of a wrong number or shape; dtypes that differ outside of autocast.
        RuntimeError: input, hx or batch_sizes of a wrong shape, T = 0, or backend="triton" where no kernel can run.
    """
    options = has_biases, num_layers, dropout, train, bidirectional, batch_first
    more: dict[str, Any] = dict(batch_sizes=batch_sizes, recompute=recompute, return_states=return_states)
    return stack(input, hx, params, *options, backend=backend, **more)
