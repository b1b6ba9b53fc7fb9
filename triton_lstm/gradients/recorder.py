"""The recorder behind record_gradients: hooks on the backward passes of LSTM modules, and the data they store."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from triton_lstm.core.checks import Group
from triton_lstm.core.layout import Layout
from triton_lstm.core.packing import Index, add_to_predecessors, first_rows
from triton_lstm.gradients import torch_recorder
from triton_lstm.gradients.statistics import (
    StepStatistics,
    asked,
    elements,
    fraction_begun,
    from_sums,
    of_rows,
    saturation,
)
from triton_lstm.operator.arguments import LayerArguments
from triton_lstm.operator.hooks import Totals, refuse_batched

Tensor = torch.Tensor


@dataclasses.dataclass
class Pass:
    """One backward pass through a layer, per direction of time: every element or only statistics."""

    rows: list[dict[str, Tensor]]
    statistics: list[dict[str, StepStatistics]]
    saturated: list[Tensor]  # (T, 4), the fraction of i, f, g, o close to an end of their range
    asked: list[Tensor]  # (T,), the norm of the gradient that enters directly at each step
    begun: Tensor | None  # (T,), the fraction of each step's sequences in which a segment begins
    starts: Index


class LayerRecorder:
    """A BackwardHook that records one layer in one call of a module, until the recording ends."""

    def __init__(self, every_element: bool) -> None:
        self.every_element = every_element
        self.active = True
        self.passes: list[Pass] = []
        self.w_hh: Tensor | None = None  # (D, 4H, P) with a projection, which is outside the time loop
        self.arguments: Any = None  # on PyTorch's path only, which has no time loop of ours
        self.projected: dict[str, tuple[int, Tensor]] = {}  # with a projection: graph task and gradient of y

    def close(self) -> None:
        self.active = False
        self.w_hh = self.arguments = None
        self.projected = {}

    def record(
        self,
        rows: list[dict[str, Tensor]],
        sums: list[dict[str, StepStatistics]],
        gates: Tensor,
        cotangents: Sequence[Tensor | None],
        starts: Index,
        resets: Index,
    ) -> None:
        """Records a pass. sums: statistics of the quantities missing from `rows`; gates: i, f, g, o of all directions;
        cotangents: see asked."""
        saturated = [saturation(part, starts) for part in gates.chunk(len(rows), -1)]
        own = asked(cotangents, gates.shape[:-1], len(rows), starts)
        begun = None if resets is None else fraction_begun(resets, starts)
        if resets is not None:
            _without_reset(rows[0], resets)
        if self.every_element:
            self.passes.append(Pass(rows, [], saturated, own, begun, starts))
        else:
            statistics = [of_rows(row, starts) | known for row, known in zip(rows, sums, strict=True)]
            self.passes.append(Pass([], statistics, saturated, own, begun, starts))

    @torch.no_grad()
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
        dy, *others = cotangents
        own = dy
        x, _, _, w_ih, w_hh, _, _, _, starts, lengths, resets = arguments
        directions, _, hidden_size = arguments.sizes
        of_directions: Sequence[Tensor] = w_hh.chunk(directions)
        assert totals.gates is not None
        dh, dgates = totals.dh, dgates.detach()
        # Copies, since autograd may accumulate into these tensors in place later
        copied = Tensor.clone if self.every_element else Tensor.detach
        dx = (dgates.flatten(0, -2) @ w_ih).view(x.shape) if dx is None else copied(dx.detach())
        if self.w_hh is not None:
            of_directions = list(self.w_hh)
            dy, own, dh = self._projected(y, dgates, self.w_hh, starts, lengths, resets)
            others[0] = None  # that of h_n is part of `own`
            dh = dh.unflatten(-1, (directions, -1))
        dy = torch.zeros_like(y) if dy is None else copied(dy.detach())
        dc0 = copied(dc0.detach())
        first = first_rows(dgates, directions, starts, lengths).chunk(directions, -1)
        rows: list[dict[str, Tensor]] = []
        sums: list[dict[str, StepStatistics]] = []
        for d in range(directions):
            row = {"input": dx, "output": dy.chunk(directions, -1)[d]}
            row |= {k: t[..., d, :] for k, t in (("hidden", dh), ("cell", totals.dc)) if t is not None}
            row |= {"gates": dgates.chunk(directions, -1)[d], "h0": first[d] @ of_directions[d]}
            rows.append(row | {"c0": dc0[d]})
            sums.append({})
            if totals.sums is not None:
                count = elements(hidden_size, y, starts)
                of_loop = {name: from_sums(totals.sums[:, d, :, k], count) for k, name in enumerate(("hidden", "cell"))}
                sums[d] = {name: known for name, known in of_loop.items() if name not in rows[d]}
        self.record(rows, sums, totals.gates, [own, *others], starts, resets)

    def watch_layer(
        self,
        outputs: tuple[Tensor, ...],
        x: Tensor,
        states: Sequence[Tensor],
        groups: list[Group],
        starts: Index,
        resets: Index,
    ) -> tuple[Tensor, ...]:
        if not any(output.requires_grad for output in outputs):
            return outputs
        self.arguments = torch_recorder.Arguments.of(x, states, groups, starts, resets)

        def after_backward(recorder: LayerRecorder, grads: tuple[Tensor | None, ...]) -> None:
            if recorder.arguments.changed_in_place():
                return
            cotangents = [*grads, *[None] * (5 - len(grads))]
            rows, gates = recorder.arguments.gradients(cotangents)
            recorder.record(rows, [{} for _ in rows], gates, cotangents, starts, resets)

        return self._with_backward_hook(outputs, after_backward)

    def watch_projection(self, y: Tensor, whole: Tensor, w_hh: Tensor) -> Tensor:
        if not y.requires_grad:
            return y
        self.w_hh = w_hh.detach()
        this = weakref.ref(self)

        def note(recorder: LayerRecorder | None, name: str, grad: Tensor | None) -> None:
            if recorder is not None and recorder.active and grad is not None:
                recorder.projected[name] = torch._C._current_graph_task_id(), grad.detach()

        # the gradient of y including that of h_n, which is a slice of it
        whole.register_hook(lambda grad: note(this(), "all", grad))
        [y] = self._with_backward_hook((y,), lambda recorder, grads: note(recorder, "output", grads[0]))
        return y

    def _with_backward_hook(
        self, tensors: tuple[Tensor, ...], after_backward: Callable[[LayerRecorder, tuple[Tensor | None, ...]], None]
    ) -> tuple[Tensor, ...]:
        """Copies of `tensors`; after_backward(self, gradients) runs once in each backward pass that reaches any."""
        this = weakref.ref(self)

        def hook(grads: tuple[Tensor | None, ...]) -> None:
            recorder = this()
            if recorder is not None and recorder.active:
                refuse_batched(grads)
                after_backward(recorder, grads)

        copies: tuple[Tensor, ...] = _BackwardHook.apply(hook, *tensors)
        return copies

    def _projected(
        self, m: Tensor, dgates: Tensor, w_hh: Tensor, starts: Index, lengths: Index, resets: Index
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dL/dy, the same plus dL/dh_n, and the total dL/dh where h = W_hr m: the time loop only has gradients of m.

        dh[t] = (dL/dy[t] plus dL/dh_n) + dgates[t+1] @ W_hh; w_hh (D, 4H, P).
        """
        task = torch._C._current_graph_task_id()
        given = {name: grad for name, (of_task, grad) in self.projected.items() if of_task == task}
        zeros = m.new_zeros(*m.shape[:-1], len(w_hh) * w_hh.shape[-1])
        own = given.get("all", zeros)
        wide = torch.promote_types(m.dtype, torch.float32)  # as in the time loop
        dh = own.to(wide, copy=True)
        for d, (part, total) in enumerate(zip(dgates.chunk(len(w_hh), -1), dh.chunk(len(w_hh), -1), strict=True)):
            back = part.to(wide) @ w_hh[d].to(wide)
            add_to_predecessors(total, back, starts, lengths, resets, against_time=d == 1)
        return given.get("output", zeros), own, dh


def _without_reset(row: dict[str, Tensor], resets: Tensor) -> None:
    """The forward direction's gradients of h0 and c0, zero where the first step's resets put zeros in their place."""
    for name in ("h0", "c0"):
        first = resets.flatten()[: row[name].shape[0], None]
        row[name] = torch.where(first, 0.0, row[name])


class _BackwardHook(torch.autograd.Function):
    """(hook, tensors) -> copies, which may be modified in place; hook receives their gradients."""

    @staticmethod
    def forward(ctx: Any, hook: Any, *tensors: Tensor) -> Any:
        ctx.hook = hook
        ctx.set_materialize_grads(False)
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.hook(grads)
        return None, *grads


@dataclasses.dataclass
class RecordedCall:
    """One call of a module."""

    module: str
    layout: Layout
    steps: int
    again: bool  # inside a backward pass: activation checkpointing calls the module a second time
    layers: list[LayerRecorder]

    @property
    def is_numbered(self) -> bool:
        """Whether it is numbered: False for a checkpoint's recomputation without a backward pass of its own."""
        return not self.again or any(layer.passes for layer in self.layers)


class Recording:
    """A CallHook: everything that a `record_gradients` block records, for the modules with these names."""

    def __init__(self, modules: list[str], steps: int) -> None:
        self.modules = modules
        self.steps = steps  # longer calls keep statistics only
        self.calls: list[RecordedCall] = []

    def begin(self, module: str, layout: Layout, steps: int, layers: int) -> list[LayerRecorder]:
        again = torch._C._current_graph_task_id() != -1
        recorders = [LayerRecorder(steps <= self.steps) for _ in range(layers)]
        self.calls.append(RecordedCall(module, layout, steps, again, recorders))
        return recorders

    def close(self) -> None:
        for call in self.calls:
            for layer in call.layers:
                layer.close()
