"""Listens to the backward passes of LSTM modules: what record_gradients hangs into them, and what it takes down."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from triton_lstm.layout import Layout
from triton_lstm.packing import Index, add_to_predecessors, first_rows
from triton_lstm.statistics import StepStatistics, asked, elements, from_sums, per_step, saturation

if TYPE_CHECKING:
    from triton_lstm.layer import Totals

Tensor = torch.Tensor
GATES = ("i", "f", "g", "o")
Quantities = dict[str, Tensor]  # of one direction of time, by the names of LayerGradients, rows as a layer has them


@dataclasses.dataclass
class Pass:
    """One backward pass through a layer, for each direction of time: every element or only statistics."""

    rows: list[Quantities]
    statistics: list[dict[str, StepStatistics]]
    saturated: list[Tensor]  # (T, 4), the share of i, f, g, o near an end of their range
    asked: list[Tensor]  # (T,), the norm of what is asked of each step itself
    starts: Index


class Tap:
    """One layer in one call of a module, until the recording ends."""

    def __init__(self, every_element: bool) -> None:
        self.every_element = every_element
        self.open = True
        self.passes: list[Pass] = []
        self.w_hh: Tensor | None = None  # (D, 4H, P) where there is a projection, which the time loop does not know
        self.arguments: Any = None  # on PyTorch's path, which has no time loop to ask
        self.outputs: dict[str, tuple[int, Tensor]] = {}  # with a projection: gradients of y, and in which pass

    def close(self) -> None:
        self.open = False
        self.w_hh = self.arguments = None
        self.outputs = {}

    def keep(
        self,
        rows: list[Quantities],
        sums: list[dict[str, StepStatistics]],
        gates: Tensor,
        cotangents: Sequence[Tensor | None],
        starts: Index,
    ) -> None:
        """Takes down a pass. sums: statistics of what is not among `rows`; gates: i, f, g, o of all directions;
        cotangents: see asked."""
        saturated = [saturation(part, starts) for part in gates.chunk(len(rows), -1)]
        own = asked(cotangents, gates.shape[:-1], len(rows), starts)
        if self.every_element:
            self.passes.append(Pass(rows, [], saturated, own, starts))
        else:
            statistics = [of_rows(row, starts) | known for row, known in zip(rows, sums, strict=True)]
            self.passes.append(Pass([], statistics, saturated, own, starts))


@dataclasses.dataclass
class Call:
    """One call of a module."""

    module: str
    layout: Layout
    steps: int
    again: bool  # inside a backward pass: checkpointing calls a module once more
    taps: list[Tap]

    @property
    def counts(self) -> bool:
        """Whether it has a number: not what a checkpoint only computes again."""
        return not self.again or any(tap.passes for tap in self.taps)


class Recording:
    """What a `record_gradients` block hears, of the modules of these names."""

    def __init__(self, modules: list[str], steps: int) -> None:
        self.modules = modules
        self.steps = steps  # calls of more than these are kept as norms only
        self.calls: list[Call] = []

    def begin(self, module: str, layout: Layout, steps: int, layers: int) -> list[Tap]:
        again = torch._C._current_graph_task_id() != -1
        self.calls.append(Call(module, layout, steps, again, [Tap(steps <= self.steps) for _ in range(layers)]))
        return self.calls[-1].taps

    def close(self) -> None:
        for call in self.calls:
            for tap in call.taps:
                tap.close()


Taps = tuple["weakref.ref[Tap]", ...]  # weak: a graph that lives longer than the recording keeps nothing of it alive


def begin(
    recordings: tuple[tuple[Recording, str], ...], input: Tensor, layout: Layout, steps: int, layers: int
) -> list[Taps]:
    """A call of a module that `recordings` know by name: what hears the backward passes of each layer.

    Raises RuntimeError where a call cannot be heard.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "record_gradients hears the backward passes of autograd, not the transforms of torch.func. Record a call "
            "outside of grad, vjp, jacrev and vmap, and its backward()"
        )
    if input.is_complex():
        raise RuntimeError("record_gradients knows no complex numbers")
    if not torch.is_grad_enabled():
        return []
    taps = [recording.begin(name, layout, steps, layers) for recording, name in recordings]
    return [tuple(weakref.ref(of_recording[k]) for of_recording in taps) for k in range(layers)]


def listening(taps: Taps) -> list[Tap]:
    """The taps that still want to hear."""
    return [tap for reference in taps if (tap := reference()) is not None and tap.open]


def of_rows(rows: Quantities, starts: Index) -> dict[str, StepStatistics]:
    """The statistics of a direction's quantities, those of the gates one by one."""
    result = {}
    for name, data in rows.items():
        if name == "gates":
            for gate, part in zip(GATES, data.chunk(4, -1), strict=True):
                result[gate] = per_step(part, starts)
        elif name in ("h0", "c0"):
            result[name] = per_step(data.unsqueeze(0), None)
        else:
            result[name] = per_step(data, starts)
    return result


class _Listener(torch.autograd.Function):
    """(note, tensors) -> copies, which may be changed in place as the tensors might; note gets their gradients."""

    @staticmethod
    def forward(ctx: Any, note: Any, *tensors: Tensor) -> Any:
        ctx.note = note
        ctx.set_materialize_grads(False)
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.note(grads)
        return None, *grads


def listen(taps: Taps, tensors: list[Tensor], note: Any) -> list[Tensor]:
    """The same tensors; note(live taps, gradients) is called once in each backward pass that reaches any of them."""

    def heard(grads: tuple[Tensor | None, ...]) -> None:
        live = listening(taps)
        if live:
            refuse_batched(grads)
            note(live, grads)

    return list(_Listener.apply(heard, *tensors))


def refuse_batched(grads: tuple[Tensor | None, ...]) -> None:
    """Raises RuntimeError for the cotangents of autograd.grad(is_grads_batched=True)."""
    if any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in grads):
        raise RuntimeError("record_gradients does not hear is_grads_batched=True: ask for one gradient")


def watch_projection(taps: Taps, y: Tensor, w_hh: Tensor) -> Tensor:
    """Where a projection follows the time loop: y (with x's rows) as the layer's user sees it, its gradients heard."""
    if not listening(taps) or not y.requires_grad:
        return y
    for tap in listening(taps):
        tap.w_hh = w_hh.detach()

    def note(name: str, live: list[Tap], grad: Tensor | None) -> None:
        for tap in live:
            if grad is not None:
                tap.outputs[name] = torch._C._current_graph_task_id(), grad.detach()

    # of y with what h_n adds, which is a part of it
    y.register_hook(lambda grad: note("all", listening(taps), grad))
    [y] = listen(taps, [y], lambda live, grads: note("output", live, grads[0]))
    return y


@torch.no_grad()
def hear(
    taps: list[Tap],
    cotangents: Sequence[Tensor | None],
    dgates: Tensor,
    dc0: Tensor,
    dx: Tensor | None,
    saved: Any,
    totals: Totals,
) -> None:
    """Takes down a backward pass through the kernels; cotangents: of a layer's results; saved: its arguments, y, the
    gates and c."""
    dy, *others = cotangents
    own = dy
    x, _, _, w_ih, w_hh, _, _, starts, lengths, y, *_ = saved
    directions, _, hidden_size = w_hh.shape
    assert totals.gates is not None
    dh, dgates = totals.dh, dgates.detach()
    # Copies of what autograd passes on, and may add to in place later
    copied = Tensor.clone if any(tap.every_element for tap in taps) else Tensor.detach
    dx = (dgates.flatten(0, -2) @ w_ih.flatten(0, 1)).reshape(x.shape) if dx is None else copied(dx.detach())
    if taps[0].w_hh is not None:
        w_hh = taps[0].w_hh
        dy, own, dh = _projected(taps[0], y, dgates, w_hh, starts, lengths)
        others[0] = None  # h_n's, which is in `own`
        dh = dh.unflatten(-1, (directions, -1))
    dy = torch.zeros_like(y) if dy is None else copied(dy.detach())
    dc0 = copied(dc0.detach())
    first = first_rows(dgates, directions, starts, lengths).chunk(directions, -1)
    rows: list[Quantities] = []
    sums: list[dict[str, StepStatistics]] = []
    for d in range(directions):
        row = {"input": dx, "output": dy.chunk(directions, -1)[d]}
        row |= {k: t[..., d, :] for k, t in (("hidden", dh), ("cell", totals.dc)) if t is not None}
        row |= {"gates": dgates.chunk(directions, -1)[d], "h0": first[d] @ w_hh[d], "c0": dc0.chunk(directions, -1)[d]}
        rows.append(row)
        sums.append({})
        if totals.sums is not None:
            count = elements(hidden_size, y, starts)
            of_loop = {name: from_sums(totals.sums[:, d, :, k], count) for k, name in enumerate(("hidden", "cell"))}
            sums[d] = {name: known for name, known in of_loop.items() if name not in rows[d]}
    for tap in taps:
        tap.keep(rows, sums, totals.gates, [own, *others], starts)


def _projected(
    tap: Tap, m: Tensor, dgates: Tensor, w_hh: Tensor, starts: Index, lengths: Index
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dy, the same with h_n's share, and the total dL/dh where h = W_hr m: the loop has the gradients of m only.

    dh[t] = what y[t] got, h_n's share included, + dgates[t+1] @ W_hh; w_hh (D, 4H, P).
    """
    task = torch._C._current_graph_task_id()
    given = {name: grad for name, (of_task, grad) in tap.outputs.items() if of_task == task}
    zeros = m.new_zeros(*m.shape[:-1], len(w_hh) * w_hh.shape[-1])
    own = given.get("all", zeros)
    wide = torch.promote_types(m.dtype, torch.float32)  # as the loop has its totals; in 16 bits the product would round
    dh = own.to(wide, copy=True)
    for d, (part, total) in enumerate(zip(dgates.chunk(len(w_hh), -1), dh.chunk(len(w_hh), -1), strict=True)):
        add_to_predecessors(total, part.to(wide) @ w_hh[d].to(wide), starts, lengths, against_time=d == 1)
    return given.get("output", zeros), own, dh
