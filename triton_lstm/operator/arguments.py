"""A layer's arguments, results and cotangents: what autograd, torch.library, torch.func and the kernels pass on."""

from __future__ import annotations

from typing import NamedTuple

import torch

Tensor = torch.Tensor


class LayerArguments(NamedTuple):
    """Of a layer with D directions of time.

    x: (T, B, I), or packed (N, I).
    h0, c0: (D, B, H), or None for zeros.
    w_ih: (D*4H, I); the gates i, f, g, o of one direction after the other, as in w_hh and the biases.
    w_hh: (D*4H, H).
    b_ih, b_hh: (D*4H,), or None.
    r0: (B, D*4H), added to the pre-activations of each sequence's first step (see projection.py), or None.
    starts, lengths: of packed data (see packing.py), or None.
    resets: (T, B), or packed (N,) bool: before which rows the state is zero (see packing.py), or None.
    """

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    r0: Tensor | None = None
    starts: Tensor | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """D, B, H."""
        rows, hidden_size = self.w_hh.shape
        batch = self.x.shape[1] if self.lengths is None else self.lengths.shape[0]
        return rows // (4 * hidden_size), batch, hidden_size


DIFFERENTIABLE = 8  # of them: all but starts, lengths and resets


# y (T, B, D*H) or packed (N, D*H); h_n and c_n (D, B, H), each in memory of its own and no view; the activated gates
# (.., D*4H) and every c (.., D*H, in the accumulator's dtype), None where they are not saved
LayerResults = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class Cotangents(NamedTuple):
    """The gradients of a layer's results, None for zeros."""

    dy: Tensor | None
    dh_n: Tensor | None
    dc_n: Tensor | None
    dgates: Tensor | None
    dc: Tensor | None
