"""The expected result of record_gradients: autograd on PyTorch's equations, per sequence, with all intermediate tensors
retained; in float64, or in another dtype for PyTorch's own error in that."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

Tensor = torch.Tensor
Found = dict[tuple[int, int], dict[str, list[Tensor]]]  # by layer and direction: a quantity of every sequence
MASK = 2.0  # factor of every other feature in place of dropout; the others are 0


def fake_dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Deterministic, and the same for every row."""
    return x * (torch.arange(x.shape[-1], device=x.device) % 2 * MASK).to(x.dtype)


def expected(
    module: nn.RNNBase,
    sequences: list[Tensor],
    hx: tuple[Tensor, Tensor],
    cotangents: tuple[list[Tensor], Tensor, Tensor],
    dtype: torch.dtype = torch.float64,
    resets: list[Tensor] | None = None,
) -> Found:
    """Per sequence (T, I): input, output, hidden, cell and gates (T, ..), h0 and c0 (..).

    hx: h0 and c0 of all sequences, (L*D, B, ..). cotangents: of every sequence's output (T, ..), of h_n and of c_n.
    dtype: of the whole calculation. resets: of every sequence, (T,).
    """
    weights = {name: weight.detach().cpu().to(dtype) for name, weight in module.named_parameters()}
    directions = 2 if module.bidirectional else 1
    found: Found = {(k, d): {} for k in range(module.num_layers) for d in range(directions)}
    for b, sequence in enumerate(sequences):
        kept: dict[tuple[int, int], dict[str, list[Tensor]]] = {}
        loss = torch.zeros((), dtype=dtype)
        xs = [x.detach().cpu().to(dtype).requires_grad_() for x in sequence]
        for k in range(module.num_layers):
            outputs: list[list[Tensor]] = [[] for _ in xs]
            for d in range(directions):
                states = tuple(state[k * directions + d, b] for state in hx)
                begins = [False] * len(xs) if resets is None else resets[b].tolist()
                steps, h0, c0, h, c = _direction(module, weights, k, d, xs, states, begins)
                row = k * directions + d
                loss = loss + (h * cotangents[1][row, b].to(h)).sum() + (c * cotangents[2][row, b].to(c)).sum()
                for output, step in zip(outputs, steps["output"], strict=True):
                    output.append(step)
                kept[k, d] = {"input": xs, "h0": [h0], "c0": [c0], **steps}
            if k == module.num_layers - 1:
                for output, cotangent in zip(outputs, cotangents[0][b], strict=True):
                    loss = loss + (torch.cat(output) * cotangent.to(dtype).cpu()).sum()
            xs = [torch.cat(output) for output in outputs]
            xs = [fake_dropout(x) for x in xs] if module.dropout and module.training else xs
            for x in xs:
                x.retain_grad()
        loss.backward()
        for place, quantities in kept.items():
            for name, tensors in quantities.items():
                grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
                found[place].setdefault(name, []).append(grads[0] if name in ("h0", "c0") else torch.stack(grads))
    return found


def _direction(
    module: nn.RNNBase,
    weights: dict[str, Tensor],
    k: int,
    d: int,
    xs: list[Tensor],
    hx: tuple[Tensor, ...],
    begins: list[bool],
) -> tuple[dict[str, list[Tensor]], Tensor, Tensor, Tensor, Tensor]:
    """Every step's output, h, c and pre-activations in the order of the steps, h0, c0, and the last h and c."""
    suffix = f"_l{k}{'_reverse' if d else ''}"
    h0, c0 = (state.detach().to(xs[0], copy=True).requires_grad_() for state in hx)
    h, c = h0, c0
    steps: dict[str, list[Tensor]] = {"output": [], "hidden": [], "cell": [], "gates": []}
    times = range(len(xs))
    for t in reversed(times) if d else times:
        x = xs[t]
        if begins[t] if not d else t + 1 < len(xs) and begins[t + 1]:
            h, c = torch.zeros_like(h), torch.zeros_like(c)
        a = weights[f"weight_ih{suffix}"] @ x + weights[f"weight_hh{suffix}"] @ h
        if module.bias:
            a = a + weights[f"bias_ih{suffix}"] + weights[f"bias_hh{suffix}"]
        i, f, g, o = a.chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        m = o.sigmoid() * c.tanh()
        h = weights[f"weight_hr{suffix}"] @ m if module.proj_size else m * 1.0
        y = h * 1.0  # the output of the loop: its gradient excludes the one through time
        for name, tensor in zip(steps, (y, h, c, a), strict=True):
            tensor.retain_grad()
            steps[name].append(tensor)
    return {name: tensors[::-1] if d else tensors for name, tensors in steps.items()}, h0, c0, h, c


def sequences_of(value: Any, lengths: list[int], batch_first: bool) -> list[Tensor]:
    """The rows of any layout, per sequence."""
    if isinstance(value, PackedSequence):
        padded, found = pad_packed_sequence(value, batch_first=True)
        assert found.tolist() == lengths
        return [row[:n] for row, n in zip(padded, lengths, strict=True)]
    if value.dim() == 2:
        return [value]
    rows = value if batch_first else value.transpose(0, 1)
    for row, n in zip(rows, lengths, strict=True):
        assert not row[n:].any(), "something where there is no step"
    return [row[:n] for row, n in zip(rows, lengths, strict=True)]
