"""A layer as ONNX's LSTM operator: what torch.onnx.export makes of the operators of ops.py and torch_ops.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from triton_lstm.core.packing import side_by_side, with_first_rows
from triton_lstm.core.segments import refuse_in_onnx
from triton_lstm.operator.arguments import LayerArguments, LayerResults
from triton_lstm.operator.torch_layer import preactivations

Tensor = torch.Tensor
linear = torch.nn.functional.linear
SURE = 100.0  # its sigmoid is 1


def register(operator: Any, decomposition: Callable[..., Any]) -> None:
    """Registers how torch.onnx.export decomposes an operator of torch.library."""
    from torch._decomp import register_decomposition

    register_decomposition(operator)(decomposition)
    # With sizes that are symbols fake tensors prefer a decomposition to the registered fake, but not to one of these
    register_decomposition(operator, type="meta")(decomposition)


def layer_by_onnx(arguments: LayerArguments) -> LayerResults:
    """A dense layer, for any T and B; the exporter removes unused results."""
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, r0, *_, resets = arguments
    refuse_in_onnx(resets)
    directions, batch, hidden_size = arguments.sizes
    rows = 4 * hidden_size
    zeros = x.new_zeros(directions, batch, hidden_size)
    h0, c0 = (zeros if state is None else state for state in (h0, c0))
    xg = preactivations(x, w_ih, b_ih, b_hh)
    w_ih, w_hh = (w.unflatten(0, (directions, rows)) for w in (w_ih, w_hh))
    picks = torch.eye(directions * rows, dtype=x.dtype, device=x.device).unflatten(0, (directions, rows))
    if r0 is None:
        y, h_n, c_n = _operator(x, h0, c0, w_ih, w_hh, (b_ih, b_hh))
    else:  # the operator's input is the pre-activations, of which every direction picks its own
        xg = with_first_rows(xg, r0, directions, None, None)
        y, h_n, c_n = _operator(xg, h0, c0, picks, w_hh)
    # The operator keeps its gates and c to itself: the gates again, in one product over all steps ...
    first = side_by_side(h0).unsqueeze(0)
    before, *after = torch.cat([first, y, first]).chunk(directions, -1)
    products = [linear(before[:-2], w_hh[0]), *(linear(part[2:], w_hh[1]) for part in after)]
    sums = (xg + torch.cat(products, -1)).unflatten(-1, (directions, 4, hidden_size))
    i, f, g, o = sums.unbind(-2)
    gates = torch.stack([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], -2).flatten(-3)
    # ... and c as the output of an LSTM whose h is c: no tanh, o = 1
    open_o = torch.stack([i, f, g, torch.full_like(o, SURE)], -2).flatten(-3)
    c, _, _ = _operator(open_o, h0, c0, picks, torch.zeros_like(w_hh), output_is_c=True)
    return y, h_n, c_n, gates, c


def _operator(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    output_is_c: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, B, D*H), h_n and c_n (D, B, H)."""
    from torch.onnx.ops import symbolic_multi_out

    (steps, batch, _), (directions, _, hidden_size) = x.shape, w_hh.shape
    b = None
    if biases[0] is not None:
        b = torch.cat([_in_onnx_order(bias.unflatten(0, (directions, -1))) for bias in biases if bias is not None], 1)
    attributes: dict[str, Any] = {
        "direction": "bidirectional" if directions == 2 else "forward",
        "hidden_size": hidden_size,
    }
    if output_is_c:
        attributes["activations"] = ["Sigmoid", "Tanh", "Affine"] * directions
        attributes["activation_alpha"], attributes["activation_beta"] = [1.0] * directions, [0.0] * directions
    state = directions, batch, hidden_size
    results = symbolic_multi_out(
        "LSTM",
        (x, _in_onnx_order(w_ih), _in_onnx_order(w_hh), b, None, h0, c0),
        attributes,
        dtypes=[x.dtype] * 3,
        shapes=[(steps, directions, batch, hidden_size), state, state],
    )
    y, h_n, c_n = (result.to(x.device) for result in results)  # made up on the CPU, wherever x is
    return y.transpose(1, 2).flatten(2), h_n, c_n


def _in_onnx_order(weights: Tensor) -> Tensor:
    """(D, 4H, ..) with the gates i, f, g, o in ONNX's order."""
    hidden_size = weights.shape[1] // 4
    i, f_and_g, o = weights[:, :hidden_size], weights[:, hidden_size:-hidden_size], weights[:, -hidden_size:]
    return torch.cat([i, o, f_and_g], 1)  # slices, which the exporter folds into the constants; chunks it does not
