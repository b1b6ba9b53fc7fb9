"""A layer with nn.LSTM's weights, its projection folded away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from triton_lstm.core.checks import Group
from triton_lstm.core.packing import last_rows
from triton_lstm.operator.arguments import LayerArguments
from triton_lstm.operator.hooks import Hooks, active
from triton_lstm.settings import layer_dtype

Tensor = torch.Tensor
linear = torch.nn.functional.linear


def one_layer(
    run: Callable[..., tuple[Any, ...]],
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    groups: list[Group],
    starts: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None = None,
    *,
    hooks: Hooks = (),
) -> tuple[Any, ...]:
    """A layer's results by `run`, with h0 (D, B, P or H) and nn.LSTM's weights of each direction."""
    w_ih, w_hh, b_ih, b_hh, w_hr = groups[0] if len(groups) == 1 else [_joined(ws) for ws in zip(*groups, strict=True)]
    options: Any = dict(hooks=hooks) if hooks else {}
    given = LayerArguments(x, h0, c0, w_ih, w_hh, b_ih, b_hh, None, starts, lengths, resets)
    if w_hr is not None:
        return _projected_layer(run, given, w_hr, len(groups), hooks, options)
    results: tuple[Any, ...] = run(given, **options)
    return results


def _projected_layer(
    run: Callable[..., tuple[Any, ...]],
    given: LayerArguments,
    w_hr: Tensor,
    directions: int,
    hooks: Hooks,
    options: Any,
) -> tuple[Any, ...]:
    """h = W_hr m makes W_hh h[t-1] = (W_hh W_hr) m[t-1], so the loop runs on m from 0, with W_hh h0 added to its first
    step, and W_hr is applied to all of m afterwards. w_hr (D*P, H).

    In float16 all of this is float32, the gates that are returned, too.
    """
    results_in, dtype = given.x.dtype, layer_dtype(given.x.dtype, True)
    cast = [None if t is None else t.to(dtype) for t in (*given[:7], w_hr)]
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr = cast  # type: ignore[assignment]
    starts, lengths, resets = given.starts, given.lengths, given.resets
    assert w_hh is not None
    of_directions = list(zip(w_hh.chunk(directions), w_hr.chunk(directions), strict=True))
    r0 = None
    if h0 is not None:
        r0 = torch.cat([linear(h, w) for h, (w, _) in zip(h0, of_directions, strict=True)], -1)
    wide = torch.promote_types(dtype, torch.float32)
    # With one step m[t-1] is 0 and w_hr gets no gradient from the loop: None, as in nn.LSTM
    only_step = given.x.shape[0] == 1 if starts is None else len(starts) == 3
    products = [w.to(wide) @ (hr.detach() if only_step else hr).to(wide) for w, hr in of_directions]
    folded = _joined(products).to(dtype)
    inner: Any = LayerArguments(x, None, c0, w_ih, folded, b_ih, b_hh, r0, starts, lengths, resets)  # type: ignore[arg-type]
    y, _, c_n, gates, c = run(inner, **options)
    outputs = [linear(m, hr) for m, (_, hr) in zip(y.chunk(directions, -1), of_directions, strict=True)]
    y = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    h_n = last_rows(y, directions, starts, lengths)
    whole = y
    for hook in active(hooks):
        y = hook.watch_projection(y, whole, w_hh.unflatten(0, (directions, -1)))
    return y.to(results_in), h_n.to(results_in), c_n.to(results_in), gates, c


def _joined(weights: Any) -> Any:
    """(D*F, ..) of every direction's (F, ..)."""
    if weights[0] is None:
        return None
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))
