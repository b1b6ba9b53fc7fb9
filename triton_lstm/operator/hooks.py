"""Hooks on the backward passes of a layer: what record_gradients implements, and the operator calls."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch

from triton_lstm.core.checks import Group
from triton_lstm.core.layout import Layout
from triton_lstm.operator.arguments import LayerArguments

Tensor = torch.Tensor


@dataclasses.dataclass
class Totals:
    """What the time loop stores for hooks, filled by layer_backward: every element, or else sums for each step."""

    every_element: bool
    dh: Tensor | None = None  # dL/dh of every step, (.., D, H) in the accumulator's dtype
    dc: Tensor | None = None
    sums: Tensor | None = None  # of both, (T, D, programs, 2, 5): see kernels/totals.py
    gates: Tensor | None = None  # i, f, g, o themselves


class BackwardHook(Protocol):
    """On one layer in one call. Its methods are called while it is active."""

    every_element: bool  # of dh and dc; else sums for each step will do
    active: bool

    def after_backward(
        self,
        cotangents: Sequence[Tensor | None],
        dgates: Tensor,
        dc0: Tensor,
        dx: Tensor | None,
        arguments: LayerArguments,
        y: Tensor,
        totals: Totals,
    ) -> None:
        """After a backward pass of the kernels. cotangents: of the results; dx: None if it was not needed."""

    def watch_layer(
        self,
        outputs: tuple[Tensor, ...],
        x: Tensor,
        states: Sequence[Tensor],
        groups: list[Group],
        starts: Tensor | None,
        resets: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """On PyTorch's path: a layer's `outputs`, y, h_n, c_n and maybe the gates and every c, for use in their place.

        x: the layer's input, dense or packed; states: h0 (D, B, P or H), c0 (D, B, H); groups: weights by direction.
        """

    def watch_projection(self, y: Tensor, whole: Tensor, w_hh: Tensor) -> Tensor:
        """y (with x's rows) after the projection that follows the time loop, for use in its place.

        whole: y as h_n is a part of it; w_hh (D, 4H, P).
        """


class CallHook(Protocol):
    """On the calls of a module."""

    def begin(self, module: str, layout: Layout, steps: int, layers: int) -> Sequence[BackwardHook]:
        """At the beginning of a call of the module of this name: a hook for each layer."""


Hooks = tuple["weakref.ref[BackwardHook]", ...]  # weak: a graph that outlives the recording keeps nothing of it alive


def begin_call(
    hooks: tuple[tuple[CallHook, str], ...], input: Tensor, layout: Layout, steps: int, layers: int
) -> list[Hooks]:
    """A call of a module: each layer's hooks. hooks: the module's, each with the module's name there.

    Raises RuntimeError for a call that hooks cannot see.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "record_gradients records the backward passes of autograd, not the transforms of torch.func. Record a call "
            "outside of grad, vjp, jacrev and vmap, and its backward()"
        )
    if input.is_complex():
        raise RuntimeError("record_gradients does not support complex numbers")
    if not torch.is_grad_enabled():
        return []
    of_layers = zip(*(hook.begin(name, layout, steps, layers) for hook, name in hooks), strict=True)
    return [tuple(weakref.ref(hook) for hook in of_layer) for of_layer in of_layers]


def active(hooks: Hooks) -> list[BackwardHook]:
    found = [reference() for reference in hooks]
    return [hook for hook in found if hook is not None and hook.active]


def refuse_batched(grads: Sequence[Tensor | None]) -> None:
    """Raises RuntimeError for the cotangents of autograd.grad(is_grads_batched=True)."""
    if any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in grads):
        raise RuntimeError("record_gradients does not support is_grads_batched=True: ask for one gradient")
