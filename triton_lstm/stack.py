"""A stack of layers, with dropout and projection, on top of one layer's autograd function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from triton_lstm.backend import (
    exports_by_tracing,
    layer_dtype,
    wants_gradient,
    why_not_triton,
    why_torch_is_faster,
)
from triton_lstm.call import LayerStates
from triton_lstm.checks import Group, by_layer, check_pair, check_shapes, check_states
from triton_lstm.packing import last_rows, side_by_side, starts_and_lengths
from triton_lstm.record import Taps, watch_projection
from triton_lstm.record_torch import listen_to_layer, recorded_lstm
from triton_lstm.torch_layer import layer_by_torch


def stack(
    input: torch.Tensor,
    hx: Sequence[torch.Tensor] | None,
    params: Sequence[torch.Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    batch_sizes: torch.Tensor | None,
    recompute: bool,
    return_states: bool,
    backend: Any,
    taps: Sequence[Taps] = (),
) -> tuple[Any, ...]:
    """lstm, with what record_gradients asks for: taps, for every layer what hears its backward passes."""
    options = has_biases, num_layers, float(dropout), train, bidirectional
    if batch_sizes is not None and torch.compiler.is_compiling():
        from triton_lstm.compiled import eagerly

        more = dict(batch_sizes=batch_sizes, recompute=recompute, return_states=return_states, backend=backend)
        return eagerly(stack, input, hx, params, *options, batch_first, **more)
    directions = 2 if bidirectional else 1
    params = list(params)
    weights = by_layer(params, num_layers * directions, has_biases)
    h_shape, c_shape = check_shapes(input, weights, directions, batch_first, batch_sizes)
    if hx is not None:
        check_pair(hx)
        check_states(input, hx[0], hx[1], h_shape, c_shape)
    faster = None
    torch_path = why_not_triton(input, backend, *params, *(() if hx is None else hx)) is not None
    if not torch_path and batch_sizes is None and not return_states and not torch.compiler.is_compiling():
        faster = why_torch_is_faster(None, input, backend, h_shape[1], params, has_biases, hx)
    if exports_by_tracing() and weights[0][-1] is not None and not return_states:
        raise RuntimeError(
            "ONNX's LSTM operator has no projection: an LSTM with proj_size cannot be exported by torch.onnx.export "
            "with dynamo=False; leave dynamo out"
        )
    if (torch_path or faster) and not return_states:
        hx = [input.new_zeros(h_shape), input.new_zeros(c_shape)] if hx is None else list(hx)
        if torch.compiler.is_compiling():
            from triton_lstm.torch_ops import lstm_by_torch

            return lstm_by_torch(input, hx, params, *options, batch_first)
        if taps and wants_gradient(input, *hx, *params):
            return recorded_lstm(input, hx, weights, options, batch_first, batch_sizes, taps)
        if batch_sizes is not None:
            return torch.lstm(input, batch_sizes, hx, params, *options)
        return torch.lstm(input, hx, params, *options, batch_first)
    kind = "cpu" if input.device.type == "meta" else input.device.type  # autocast knows no meta device
    if torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        input, hx = input.to(dtype), None if hx is None else [state.to(dtype) for state in hx]
        weights = [[None if w is None else w.to(dtype) for w in group] for group in weights]
    with torch.autocast(kind, enabled=False):
        transposed = batch_first and batch_sizes is None
        x = input.transpose(0, 1) if transposed else input
        packed = (None, None) if batch_sizes is None else starts_and_lengths(batch_sizes, input.device)
        if torch_path:
            run: Callable[..., tuple[Any, ...]] = layer_by_torch
            if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():  # which cannot trace it
                from triton_lstm.onnx_layer import layer_by_onnx

                run = layer_by_onnx if torch.onnx.is_in_onnx_export() else layer_by_torch
        else:
            from triton_lstm.autograd import layer

            run = functools.partial(layer, recompute=recompute, states=return_states)
        zeros: Any = None if hx is not None else input.new_zeros(c_shape[1], directions * c_shape[2])
        h_n, c_n, states = [], [], []
        for k in range(num_layers):
            rows = slice(k * directions, (k + 1) * directions)
            h0 = None if hx is None else side_by_side(hx[0][rows])
            c0 = zeros if hx is None else side_by_side(hx[1][rows])
            inner = taps[k] if taps and not torch_path else ()
            y, h, c, gates, c_all = one_layer(run, x, h0, c0, weights[rows], *packed, taps=inner)
            if taps and torch_path:
                hx_k = [state.new_zeros(state.shape) for state in (h, c)] if hx is None else [s[rows] for s in hx]
                layer_k = (y, h, c, gates, c_all), x, hx_k, weights[rows]
                y, h, c, gates, c_all = listen_to_layer(taps[k], *layer_k, packed[0])
            x = y
            h_n.append(h)
            c_n.append(c)
            if return_states:
                states.append(_states(gates.to(input.dtype), c_all, directions))
            if train and dropout and k < num_layers - 1:
                x = torch.nn.functional.dropout(x, dropout, True)
    if torch.compiler.is_compiling() and x.requires_grad and not torch_path:
        from triton_lstm.ops import fresh

        x = fresh(x) if transposed else x
        states = [LayerStates(*map(fresh, layer)) for layer in states]
    if batch_sizes is not None and len(x) == len(batch_sizes) * h_shape[1]:  # one length
        plain = weights[0][-1] is None and x.dtype == torch.float32
        x = x.view(x.shape) if plain else x  # a view, as PyTorch's, which takes these for a dense batch
    if transposed:
        x, states = x.transpose(0, 1), [LayerStates(*(t.transpose(0, 1) for t in layer)) for layer in states]
    results = x, _stacked(h_n), _stacked(c_n)
    return (*results, states) if return_states else results


def _stacked(states: list[torch.Tensor]) -> torch.Tensor:
    """(D, B, F) of every layer -> (L*D, B, F)."""
    return states[0] if len(states) == 1 else torch.cat(states)


def _states(gates: torch.Tensor, c: torch.Tensor, directions: int) -> LayerStates:
    """Of a layer's gates (.., D*4H) and c (.., D*H)."""
    by_name = gates.unflatten(-1, (directions, 4, -1)).unbind(-2)
    return LayerStates(c.to(gates.dtype), *(gate.flatten(-2) for gate in by_name))


def one_layer(
    run: Callable[..., tuple[torch.Tensor, ...]],
    x: torch.Tensor,
    h0: torch.Tensor | None,
    c0: torch.Tensor,
    groups: list[Group],
    starts: torch.Tensor | None,
    lengths: torch.Tensor | None,
    *,
    taps: Taps,
) -> tuple[torch.Tensor, ...]:
    """One layer by `run`, as layer.py has it, but with h0 (B, D*(P or H)) and h_n (D, B, P or H).

    A projection is folded away: h = W_hr m makes W_hh h[t-1] = (W_hh W_hr) m[t-1], so the loop runs on m from 0, with
    W_hh h0 added to its first step, and W_hr is applied to all of m afterwards. In float16 all of this is float32, the
    gates that are returned, too.
    """
    directions, results_in = len(groups), x.dtype
    dtype = layer_dtype(x.dtype, groups[0][-1] is not None)
    x, h0, c0 = x.to(dtype), None if h0 is None else h0.to(dtype), c0.to(dtype)
    stacked: list[Any] = [None if ws[0] is None else _stack(ws).to(dtype) for ws in zip(*groups, strict=True)]
    w_ih, w_hh, b_ih, b_hh, w_hr = stacked
    biases = None if b_ih is None else torch.stack([b_ih, b_hh])
    r0 = None
    if w_hr is not None:
        if h0 is not None:
            shares = zip(h0.chunk(directions, -1), w_hh, strict=True)
            r0 = torch.cat([torch.nn.functional.linear(h, w) for h, w in shares], -1)
        wide = torch.promote_types(w_hr.dtype, torch.float32)
        # At the only step m[t-1] is 0: the loop owes w_hr no gradient, and None is what nn.LSTM gives
        only_step = x.shape[0] == 1 if starts is None else len(starts) == 3
        folded = w_hr.detach() if only_step else w_hr
        w_hh, h0 = (w_hh.to(wide) @ folded.to(wide)).to(w_hr.dtype), None
    heard = dict(taps=taps) if taps else {}
    y, h_n, c_n, gates, c = run(x, h0, c0, w_ih, w_hh, biases, r0, starts, lengths, **heard)
    if w_hr is not None:
        projected = zip(y.chunk(directions, -1), w_hr, strict=True)
        outputs = [torch.nn.functional.linear(m, w) for m, w in projected]
        y = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        h_n = last_rows(y, directions, starts, lengths)
        y = watch_projection(taps, y, stacked[1]) if taps else y
    return y.to(results_in), h_n.to(results_in), c_n.to(results_in), gates, c


def _stack(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    return weights[0].unsqueeze(0) if len(weights) == 1 else torch.stack(list(weights))
