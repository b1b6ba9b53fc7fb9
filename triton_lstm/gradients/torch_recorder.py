"""Recording on PyTorch's path: its own LSTM computes the model's results, the reference the recorded gradients.

PyTorch's LSTM exposes no per-step gradients. The reference recomputes them from each layer's input and the gradients
of its outputs.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from triton_lstm.core.checks import Group
from triton_lstm.core.packing import batch_sizes_of
from triton_lstm.operator.torch_layer import direction_steps

Tensor = torch.Tensor


@dataclasses.dataclass
class Arguments:
    """The arguments of a layer in a call, kept for its backward pass."""

    x: Tensor
    states: list[Tensor]
    groups: list[Group]
    starts: Tensor | None
    resets: Tensor | None
    used: list[Tensor]
    versions: list[int]

    @classmethod
    def of(
        cls,
        x: Tensor,
        states: Sequence[Tensor],
        groups: list[Group],
        starts: Tensor | None,
        resets: Tensor | None,
    ) -> Arguments:
        every = (x, *states, resets, *(w for group in groups for w in group))
        used = [t for t in every if t is not None and not t.is_inference()]
        detached = [[None if w is None else w.detach() for w in group] for group in groups]
        versions = [t._version for t in used]
        return cls(x.detach(), [state.detach() for state in states], detached, starts, resets, used, versions)

    def changed_in_place(self) -> bool:
        """Whether one of them was, which gives a warning."""
        if [t._version for t in self.used] == self.versions:
            return False
        warnings.warn(
            "the input, its resets or a weight of an LSTM was modified in place between its call and the backward "
            "pass: record_gradients cannot recompute the gradients of this pass and skips it",
            stacklevel=2,
        )
        return True

    def gradients(self, cotangents: list[Tensor | None]) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The quantities of each direction, and the gates (.., D*4H). cotangents: of y, h_n, c_n, gates, every c."""
        return _gradients(cotangents, self.x, self.states, self.groups, self.starts, self.resets)


def _gradients(
    cotangents: list[Tensor | None],
    x: Tensor,
    states: Sequence[Tensor],
    groups: list[Group],
    starts: Tensor | None,
    resets: Tensor | None,
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """The quantities of each direction, and the gates (.., D*4H), by autograd on the reference."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dtype, directions, batch_sizes = x.dtype, len(groups), batch_sizes_of(starts)

    def leaf(t: Tensor) -> Tensor:
        return t.detach().to(wide, copy=True).requires_grad_()

    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x, h0, c0 = leaf(x), *([leaf(s) for s in state] for state in states)
        join = torch.stack if batch_sizes is None else torch.cat
        outputs, given, inner, gates = [], [], [], []
        for d, group in enumerate(groups):
            weights: list[Any] = [None if w is None else w.detach().to(wide) for w in group]
            w_ih, w_hh, b_ih, b_hh, w_hr = weights
            bias = None if b_ih is None else b_ih + b_hh
            xg = torch.nn.functional.linear(x, w_ih, bias)
            steps, h_n, c_n = direction_steps(xg, h0[d], c0[d], w_hh, w_hr, batch_sizes, resets, against_time=d == 1)
            every_gate, every_c, every_h = zip(*steps, strict=True)
            gates.append(join(every_gate))
            of_direction = [join(every_h), h_n, c_n, gates[d], join(every_c)]
            for k, (output, grad) in enumerate(zip(of_direction, cotangents, strict=True)):
                if grad is not None:
                    outputs.append(output)
                    given.append((grad[d] if k in (1, 2) else grad.chunk(directions, -1)[d]).to(wide))
            inner.append((xg, every_h, every_c))
        wanted = [x, *h0, *c0, *(t for xg, hs, cs in inner for t in (xg, *hs, *cs))]
        found = iter(torch.autograd.grad(outputs, wanted, given, materialize_grads=True))
    dx, dh0, dc0 = next(found).to(dtype), [next(found) for _ in h0], [next(found) for _ in c0]
    rows = []
    for d, (_, every_h, every_c) in enumerate(inner):
        dgates = next(found).to(dtype)
        dh, dc = join([next(found) for _ in every_h]), join([next(found) for _ in every_c])
        dy = cotangents[0]
        dy = torch.zeros_like(dh, dtype=dtype) if dy is None else dy.detach().chunk(directions, -1)[d].clone()
        row = {"input": dx, "output": dy, "hidden": dh, "cell": dc, "gates": dgates}
        rows.append(row | {"h0": dh0[d].to(dtype), "c0": dc0[d].to(dtype)})
    return rows, torch.cat(gates, -1).detach()
