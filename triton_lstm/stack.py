"""A stack of layers with dropout, along the route that dispatch has decided on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from triton_lstm.core.call import LayerStates
from triton_lstm.core.checks import Group
from triton_lstm.core.packing import Rows, starts_and_lengths
from triton_lstm.core.segments import Segments, refuse_in_onnx, segments_of, without_reset
from triton_lstm.dispatch import Route, has_no_values
from triton_lstm.operator.hooks import Hooks, active
from triton_lstm.operator.projection import one_layer
from triton_lstm.operator.torch_layer import layer_by_torch
from triton_lstm.operator.torch_path import hooked_lstm, lstm_of_segments
from triton_lstm.settings import exports_by_tracing, wants_gradient
from triton_lstm.system.installed import release

Tensor = torch.Tensor
Shape = tuple[int, int, int]
VIEWS_OF_PACKED = release(torch.__version__) >= (2, 13)


class Options(NamedTuple):
    """torch.lstm's, in its order."""

    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool


def stack(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    params: Sequence[Tensor],
    weights: list[Group],
    shapes: tuple[Shape, Shape],
    options: Options,
    rows: Rows,
    route: Route,
    *,
    recompute: bool = False,
    return_states: bool = False,
    hooks: Sequence[Hooks] = (),
) -> tuple[Any, ...]:
    """output, h_n and c_n, and with `return_states` every layer's LayerStates, of what was checked already.

    weights: params by layer and direction; shapes: of h0 and c0; hooks: of every layer.
    """
    directions = 2 if options.bidirectional else 1
    by_torch = not (route.kernels or return_states)
    if rows.segments is not None and not by_torch:
        same: Any = dict(params=params, weights=weights, options=options, route=route, recompute=recompute)
        run = functools.partial(stack, **same, return_states=return_states)
        return _side_by_side(run, input, hx, shapes, rows, directions)
    if rows.resets is not None:
        if exports_by_tracing():
            refuse_in_onnx(rows.resets)
        resets = rows.resets.transpose(0, 1).contiguous() if rows.transposed else rows.resets
        rows = rows._replace(resets=resets if resets.numel() else None)
        if hx is not None:
            first = resets[0] if rows.batch_sizes is None else resets[: shapes[0][1]]
            hx = without_reset(hx, first, directions)
    if by_torch and rows.resets is not None and not torch.compiler.is_compiling() and has_no_values(rows.resets):
        by_torch = False  # the loop of plain torch need not know where segments begin
    if by_torch:
        return _torch_lstm(input, hx, params, weights, shapes, options, rows, hooks)
    kind = input.device.type
    kind = "cpu" if kind == "meta" else kind  # autocast has no meta device
    more = shapes, options, rows, route, recompute, return_states, hooks
    if not torch.is_autocast_enabled(kind):
        return _layers(input, hx, weights, None, *more)
    dtype = None if input.dtype == torch.float64 else torch.get_autocast_dtype(kind)
    if dtype is not None:
        input, hx = input.to(dtype), None if hx is None else [state.to(dtype) for state in hx]
    with torch.autocast(kind, enabled=False):
        return _layers(input, hx, weights, dtype, *more)


def _side_by_side(
    run: Callable[..., tuple[Any, ...]],
    input: Tensor,
    hx: Sequence[Tensor] | None,
    shapes: tuple[Shape, Shape],
    rows: Rows,
    directions: int,
) -> tuple[Any, ...]:
    """What `run`, a stack, makes of a dense batch whose segments are the sequences of a packed one."""
    segments: Segments = rows.segments

    def run_packed(x: Tensor, states: Sequence[Tensor] | None) -> tuple[Any, ...]:
        of_packed = [(groups, segments.number, features) for groups, _, features in shapes]
        return run(x, states, shapes=of_packed, rows=Rows(batch_sizes=segments.batch_sizes))

    x = input.transpose(0, 1) if rows.transposed else input
    y, h_n, c_n, *states = segments.run(run_packed, x, hx, directions)
    if rows.transposed:
        y = y.transpose(0, 1)
        states = [[LayerStates(*(t.transpose(0, 1) for t in layer)) for layer in layers] for layers in states]
    return y, h_n, c_n, *states


def _torch_lstm(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    params: Sequence[Tensor],
    weights: list[Group],
    shapes: tuple[Shape, Shape],
    options: Options,
    rows: Rows,
    hooks: Sequence[Hooks],
) -> tuple[Any, ...]:
    """PyTorch's own LSTM; of segments, if there are any, that were split and packed."""
    if weights[0][-1] is not None and exports_by_tracing():
        raise RuntimeError(
            "ONNX's LSTM operator has no projection: an LSTM with proj_size cannot be exported by torch.onnx.export "
            "with dynamo=False; leave dynamo out"
        )
    batch_first, batch_sizes, resets, segments = rows
    lstm: Any = torch.lstm
    hx = [input.new_zeros(shape) for shape in shapes] if hx is None else list(hx)
    if torch.compiler.is_compiling():
        from triton_lstm.operator.torch_library import lstm_by_torch

        return lstm_by_torch(input, hx, params, *options, batch_first, resets)
    if hooks and wants_gradient(input, *hx, *params):
        return hooked_lstm(input, hx, weights, options, rows, hooks)
    if resets is not None:
        segments = segments_of(resets, batch_sizes, input.device)
    if segments is not None:
        x = input.transpose(0, 1) if rows.transposed else input
        y, *states = lstm_of_segments(x, hx, params, options, segments)
        return y.transpose(0, 1) if rows.transposed else y, *states
    if batch_sizes is not None:
        results: tuple[Tensor, ...] = lstm(input, batch_sizes, hx, params, *options)
        return results
    results = lstm(input, hx, params, *options, batch_first)
    return results


def _layers(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: list[Group],
    dtype: torch.dtype | None,
    shapes: tuple[Shape, Shape],
    options: Options,
    rows: Rows,
    route: Route,
    recompute: bool,
    return_states: bool,
    hooks: Sequence[Hooks],
) -> tuple[Any, ...]:
    """Layer by layer, on the kernels or in plain torch. dtype: the weights', if another than theirs."""
    transposed, batch_sizes, directions = rows.transposed, rows.batch_sizes, 2 if options.bidirectional else 1
    x = input.transpose(0, 1) if transposed else input
    starts, lengths = (None, None) if batch_sizes is None else starts_and_lengths(batch_sizes, input.device)
    run = _runner(route, recompute, return_states)
    h_n, c_n, states = [], [], []
    for k in range(options.num_layers):
        groups = slice(k * directions, (k + 1) * directions)
        h0, c0 = (None, None) if hx is None else hx if options.num_layers == 1 else (hx[0][groups], hx[1][groups])
        inner = hooks[k] if hooks and route.kernels else ()
        of_layer = weights[groups]
        if dtype is not None:  # here, so that autograd has their gradients before it begins with the layer below
            of_layer = [[None if w is None else w.to(dtype) for w in group] for group in of_layer]
        y, h, c, gates, c_all = one_layer(run, x, h0, c0, of_layer, starts, lengths, rows.resets, hooks=inner)
        for hook in active(hooks[k]) if hooks and not route.kernels else ():
            zeros = [state.new_zeros(state.shape) for state in (h, c)]
            given = x, zeros if h0 is None or c0 is None else [h0, c0], of_layer
            y, h, c, gates, c_all = hook.watch_layer((y, h, c, gates, c_all), *given, starts, rows.resets)
        x = y
        h_n.append(h)
        c_n.append(c)
        if return_states:
            states.append(_states(gates.to(input.dtype), c_all, directions))
        if options.train and options.dropout and k < options.num_layers - 1:
            x = torch.nn.functional.dropout(x, options.dropout, True)
    if route.kernels and x.requires_grad and torch.compiler.is_compiling():
        from triton_lstm.operator.library import fresh

        x = fresh(x) if transposed else x
        states = [LayerStates(*map(fresh, layer)) for layer in states]
    if VIEWS_OF_PACKED and batch_sizes is not None and len(x) == len(batch_sizes) * shapes[0][1]:  # one length
        plain = weights[0][-1] is None and x.dtype == torch.float32
        x = x.view(x.shape) if plain else x  # a view, as PyTorch's, which takes these for a dense batch
    if transposed:
        x, states = x.transpose(0, 1), [LayerStates(*(t.transpose(0, 1) for t in layer)) for layer in states]
    one = options.num_layers == 1
    results = x, h_n[0] if one else torch.cat(h_n), c_n[0] if one else torch.cat(c_n)
    return (*results, states) if return_states else results


def _runner(route: Route, recompute: bool, return_states: bool) -> Callable[..., tuple[Any, ...]]:
    """What computes one layer."""
    if route.kernels:
        from triton_lstm.operator.autograd import layer

        return functools.partial(layer, recompute=recompute, states=return_states)
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():  # which cannot trace it
        from triton_lstm.operator.onnx_layer import layer_by_onnx

        return layer_by_onnx if torch.onnx.is_in_onnx_export() else layer_by_torch
    return layer_by_torch


def _states(gates: Tensor, c: Tensor, directions: int) -> LayerStates:
    """Of a layer's gates (.., D*4H) and c (.., D*H)."""
    by_name = gates.unflatten(-1, (directions, 4, -1)).unbind(-2)
    return LayerStates(c.to(gates.dtype), *(gate.flatten(-2) for gate in by_name))
