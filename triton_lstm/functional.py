"""lstm(): torch.lstm's arguments, for a stack of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from triton_lstm.core.call import LayerStates
from triton_lstm.core.checks import TENSORS_ONLY, by_layer, check_pair, check_shapes, check_states
from triton_lstm.core.packing import Rows
from triton_lstm.core.segments import arranged
from triton_lstm.dispatch import decide, has_no_values
from triton_lstm.settings import Backend
from triton_lstm.stack import Options, stack

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
    resets: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,
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
    resets: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,
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
    resets: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,
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
    resets: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,
    recompute: bool = False,
    return_states: bool = False,
    backend: Backend | None = None,
) -> Any:
    """A stack of LSTM layers, with torch.lstm's arguments in torch.lstm's order. See LSTM for the equations.

    Args:
        input: (T, B, I), or (B, T, I) with `batch_first`; float32, bfloat16, float16 (float64 off the kernels). With
            `batch_sizes` a PackedSequence's data (N, I).
        hx: h0 (L*D, B, P or H) and c0 (L*D, B, H), or None for zeros. L layers, D directions.
        params: nn.LSTM's weights in nn.LSTM's order: for each layer, for each direction inside it, weight_ih (4H, ..),
            weight_hh (4H, P or H), if `has_biases` bias_ih and bias_hh (4H,), and with a projection weight_hr (P, H).
        has_biases, num_layers, bidirectional, batch_first: as of nn.LSTM.
        dropout: probability for every layer's output but the last one's; only if `train`.
        batch_sizes: a PackedSequence's, (T,) int64 on the CPU; hx and its results are in the order of the packed rows.
        resets: bool, (T, B), (B, T) with `batch_first` or packed (N,): before which rows the state is zero. See LSTM.
        cu_seqlens: of documents in a batch of one sequence; in the place of resets. See LSTM.
        recompute: keep only the output and c for the backward pass, which recomputes the gates in one matmul.
        return_states: also return every layer's c and gates.
        backend: "auto", "triton" or "torch"; None reads TRITON_LSTM_BACKEND.

    Returns:
        output (T, B, D*(P or H)), its transpose with `batch_first` or packed (N, D*(P or H)); h_n and c_n (shaped as h0
        and c0); with `return_states` a list with the LayerStates of every layer.

    Raises:
        TypeError: params that are no tensors.
        ValueError: an unknown backend; params of a wrong number or shape; dtypes that differ outside of autocast;
            resets or cu_seqlens that do not fit the input.
        RuntimeError: input, hx or batch_sizes of a wrong shape, T = 0, or backend="triton" where no kernel can run.

    Example::

        import torch
        import triton_lstm

        params = list(torch.nn.LSTM(10, 20).parameters())
        output, h_n, c_n = triton_lstm.lstm(torch.randn(5, 3, 10), None, params)
    """
    if batch_sizes is not None and torch.compiler.is_compiling():
        from triton_lstm.operator.compiled import eagerly

        more: Any = dict(batch_sizes=batch_sizes, resets=resets, cu_seqlens=cu_seqlens, recompute=recompute)
        more |= dict(return_states=return_states, backend=backend)
        arguments = input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
        return eagerly(lstm, *arguments, **more)
    params = list(params)
    if not all(isinstance(param, torch.Tensor) for param in params):
        raise TypeError(TENSORS_ONLY)
    options = Options(has_biases, num_layers, float(dropout), train, bidirectional)
    directions = 2 if bidirectional else 1
    weights = by_layer(params, num_layers * directions, has_biases)
    shapes = check_shapes(input, weights, directions, batch_first, batch_sizes)
    if hx is not None:
        check_pair(hx)
        check_states(input, hx[0], hx[1], *shapes)
    batch = shapes[0][1]
    rows = Rows(batch_first, batch_sizes)
    if resets is not None or cu_seqlens is not None:
        rows = arranged(input, rows, resets, cu_seqlens, known=not has_no_values(input))
    kernels_only = return_states or not rows.plain
    route = decide(input, params, hx, backend, batch=batch, has_biases=has_biases, kernels_only=kernels_only)
    states: Any = dict(recompute=recompute, return_states=return_states)
    return stack(input, hx, params, weights, shapes, options, rows, route, **states)
