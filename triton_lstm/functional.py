"""lstm(): layers, directions, dropout and projection on top of one layer's autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from triton_lstm.backend import Backend, why_not_triton, why_torch_is_faster

# weight_ih, weight_hh, bias_ih, bias_hh, weight_hr of one layer and direction; each of the last three may be None
Group = list[Any]


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
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A stack of LSTM layers, with torch.lstm's arguments in torch.lstm's order.

    Args:
        input: (T, B, I), or (B, T, I) with `batch_first`; float32, bfloat16, float16 (float64 off the kernels).
        hx: h0 (L*D, B, P or H) and c0 (L*D, B, H), or None for zeros. L layers, D directions.
        params: nn.LSTM's weights in nn.LSTM's order: for each layer, for each direction inside it, weight_ih (4H, ..),
            weight_hh (4H, P or H), if `has_biases` bias_ih and bias_hh (4H,), and with a projection weight_hr (P, H).
        dropout: probability for every layer's output but the last one's; only if `train`.
        backend: "auto", "triton" or "torch"; None reads TRITON_LSTM_BACKEND.

    Returns:
        output (T, B, D*(P or H)) or its transpose with `batch_first`, h_n and c_n (shaped as h0 and c0).

    Raises:
        TypeError: params that are no tensors.
        ValueError: an unknown backend; params of a wrong number or shape; dtypes that differ outside of autocast.
        RuntimeError: input or hx of a wrong shape, T = 0, or backend="triton" where the kernels cannot run.
    """
    directions = 2 if bidirectional else 1
    params = list(params)
    weights = _by_layer(params, num_layers * directions, has_biases)
    h_shape, c_shape = _check_weights(input, weights, directions, batch_first)
    if hx is not None and len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")
    h0, c0 = (input.new_zeros(h_shape), input.new_zeros(c_shape)) if hx is None else hx
    _check_states(input, h0, c0, h_shape, c_shape)
    reason = why_not_triton(input, backend)
    if reason or why_torch_is_faster(None, input, backend, h_shape[1], params, has_biases, hx):
        return torch.lstm(
            input, [h0, c0], params, has_biases, num_layers, float(dropout), train, bidirectional, batch_first
        )
    if torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
        input, h0, c0 = input.to(dtype), h0.to(dtype), c0.to(dtype)
        weights = [[None if w is None else w.to(dtype) for w in group] for group in weights]
    with torch.autocast(input.device.type, enabled=False):
        x = input.transpose(0, 1) if batch_first else input
        h_n: list[torch.Tensor] = []
        c_n: list[torch.Tensor] = []
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                k = layer * directions + direction
                y, h, c = _layer(x, h0[k], c0[k], weights[k], reverse=direction == 1)
                outputs.append(y)
                h_n.append(h)
                c_n.append(c)
            x = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
            if train and dropout and layer < num_layers - 1:
                x = torch.nn.functional.dropout(x, dropout, True)
    return x.transpose(0, 1) if batch_first else x, _stack(h_n), _stack(c_n)


def _layer(
    x: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor, group: Group, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer and direction: x (T, B, I), h0 (B, P or H), c0 (B, H) -> y, h_n, c_n.

    A projection is folded away: h = W_hr m makes W_hh h[t-1] = (W_hh W_hr) m[t-1], so the loop runs on m from 0, with
    W_hh h0 added to its first step, and W_hr is applied to all of m afterwards.
    """
    from triton_lstm.autograd import accumulator, layer

    w_ih, w_hh, b_ih, b_hh, w_hr = group
    r0 = None
    if w_hr is not None:
        wide = accumulator(w_hr.dtype)
        r0 = torch.nn.functional.linear(h0, w_hh)
        w_hh = (w_hh.to(wide) @ w_hr.to(wide)).to(w_hr.dtype)
        h0 = torch.zeros_like(c0)
    y, h_n, c_n = layer(x, h0, c0, w_ih, w_hh, b_ih, b_hh, r0, reverse)
    if w_hr is not None:
        y = torch.nn.functional.linear(y, w_hr)
        h_n = y[0 if reverse else -1].clone()
    return y, h_n, c_n


def _stack(states: list[torch.Tensor]) -> torch.Tensor:
    return states[0].unsqueeze(0) if len(states) == 1 else torch.stack(states)


def _by_layer(params: Sequence[torch.Tensor], groups: int, has_biases: bool) -> list[Group]:
    if groups < 1:
        raise ValueError("num_layers must be greater than zero")
    if not all(isinstance(param, torch.Tensor) for param in params):
        raise TypeError("params must hold tensors only; for a layer without biases leave them out: has_biases=False")
    plain = 4 if has_biases else 2
    size, rest = divmod(len(params), groups)
    if rest or size not in (plain, plain + 1):
        raise ValueError(
            f"params must hold {plain * groups} tensors, or {(plain + 1) * groups} with a projection "
            f"({groups} layers and directions, has_biases={has_biases}), got {len(params)}"
        )
    result: list[Group] = []
    for k in range(groups):
        group: Group = list(params[k * size : (k + 1) * size])
        biases = group[2:4] if has_biases else [None, None]
        result.append([*group[:2], *biases, group[-1] if size > plain else None])
    return result


def _check_weights(
    input: torch.Tensor, weights: list[Group], directions: int, batch_first: bool
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Raises unless input and weights fit together; returns the shapes that h0 and c0 must have."""
    if input.dim() != 3:
        raise RuntimeError(f"input must have 3 dimensions, got {input.dim()}")
    batch, steps = (input.shape[0], input.shape[1]) if batch_first else (input.shape[1], input.shape[0])
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    _, w_hh, *_, w_hr = weights[0]
    if w_hh.dim() != 2 or (w_hr is not None and w_hr.dim() != 2):
        raise ValueError(f"weight_hh and weight_hr must have 2 dimensions, got {w_hh.dim()} in weight_hh")
    hidden = w_hh.shape[0] // 4
    out = hidden if w_hr is None else w_hr.shape[0]
    for k, group in enumerate(weights):
        width = input.shape[2] if k < directions else directions * out
        shapes = [(4 * hidden, width), (4 * hidden, out), (4 * hidden,), (4 * hidden,), (out, hidden)]
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
        for name, tensor, shape in zip(names, group, shapes, strict=True):
            if tensor is None:
                continue
            if tensor.shape != shape:
                raise ValueError(f"{name} of layer {k // directions} must be {shape}, got {tuple(tensor.shape)}")
            if tensor.device != input.device:
                raise RuntimeError(
                    "Input and parameter tensors are not at the same device, found input tensor at "
                    f"{input.device} and parameter tensor at {tensor.device}"
                )
            if tensor.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
                raise ValueError(
                    f"RNN input dtype ({input.dtype}) does not match weight dtype ({tensor.dtype}). Convert input: "
                    f"input.to({tensor.dtype}), or convert model: model.to({input.dtype})"
                )
    return (len(weights), batch, out), (len(weights), batch, hidden)


def _check_states(
    input: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor, h_shape: tuple[int, ...], c_shape: tuple[int, ...]
) -> None:
    for k, (state, shape) in enumerate([(h0, h_shape), (c0, c_shape)]):
        if state.shape != shape:
            raise RuntimeError(f"Expected hidden[{k}] size {shape}, got {list(state.shape)}")
        if state.device != input.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, found input tensor at "
                f"{input.device} and hidden tensor at {state.device}"
            )
        if state.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
            raise ValueError(f"hx[{k}] has dtype {state.dtype}, the input {input.dtype}. Convert one of them.")
