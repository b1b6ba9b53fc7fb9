"""record_gradients: every gradient inside the LSTMs of a model, to look at, tabulate and plot."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import nn

from triton_lstm.layer_gradients import DIRECTIONS, Gates, LayerGradients
from triton_lstm.module import LSTM
from triton_lstm.record import Recording

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

CHOICES = ("module", "call", "layer", "direction", "backward")


class Gradients(Sequence[LayerGradients]):
    """What a `record_gradients` block has heard: a list of `LayerGradients`, by module, call, layer and direction.

    `select` narrows it down; where one is left, its input, output, hidden, cell, gates, h0 and c0 are here, too.
    `frame`, `summary`, `plot` and `log` show what there is, or what was selected.
    """

    def __init__(self, recording: Recording, chosen: dict[str, Any] | None = None) -> None:
        self._recording = recording
        self._chosen = chosen or {}

    def _records(self) -> list[LayerGradients]:
        found = []
        numbers = dict.fromkeys(self._recording.modules, -1)
        for call in (call for call in list(self._recording.calls) if call.counts):
            numbers[call.module] += 1
            for layer, tap in enumerate(call.taps):
                for number, backward in enumerate(tap.passes):
                    place = call.module, numbers[call.module], layer, number
                    for direction in range(len(backward.saturated)):
                        found.append(LayerGradients(place, direction, backward, call.layout, call.steps))
        order = self._recording.modules.index
        found.sort(key=lambda r: (order(r.module), r.call, r.backward, r.layer, DIRECTIONS.index(r.direction)))
        return [r for r in found if all(getattr(r, name) == value for name, value in self._chosen.items())]

    def _some(self) -> list[LayerGradients]:
        """What was recorded, or RuntimeError with the reason why nothing was."""
        records = self._records()
        if not records:
            raise RuntimeError(self._why_nothing())
        return records

    def _why_nothing(self) -> str:
        called: dict[str, int] = {}
        for call in self._recording.calls:
            called[call.module] = called.get(call.module, 0) + 1
        if not called:
            names = ", ".join(map(repr, self._recording.modules))
            return (
                f"no gradient was recorded: {names} was not called inside the block, or only where gradients are off. "
                "Call the model, and backward() of its loss, inside `with record_gradients(model)`"
            )
        counts = ", ".join(f"{name!r} was called {n} time{'s' * (n > 1)}" for name, n in called.items())
        return (
            f"no gradient was recorded: {counts}, but no backward pass came by inside the block. "
            "Call backward() of the loss inside it, and let something require a gradient"
        )

    def select(
        self,
        *,
        module: str | None = None,
        call: int | None = None,
        layer: int | None = None,
        direction: Literal["forward", "reverse"] | None = None,
        backward: int | None = None,
    ) -> Gradients:
        """Those of one module, call, layer, direction of time and backward pass; None takes all. Negative numbers count
        from the end.

        Raises LookupError where there are none, with what there is.
        """
        given = dict(zip(CHOICES, (module, call, layer, direction, backward), strict=True))
        records = self._some()
        chosen = dict(self._chosen)
        for name, value in given.items():
            if value is None:
                continue
            there = list(dict.fromkeys(getattr(r, name) for r in records))
            if isinstance(value, int) and value < 0:
                value += max((n for n in there if isinstance(n, int)), default=0) + 1
            if value not in there:
                raise LookupError(
                    f"nothing was recorded of {name}={given[name]!r}; there is {', '.join(map(repr, there))}"
                )
            records = [r for r in records if getattr(r, name) == value]
            chosen[name] = value
        return Gradients(self._recording, chosen)

    def _one(self, name: str) -> LayerGradients:
        records = self._some()
        if len(records) > 1:
            differ = [c for c in CHOICES if len({getattr(r, c) for r in records}) > 1]
            first = ", ".join(f"{c}={getattr(records[0], c)!r}" for c in differ)
            raise RuntimeError(
                f"there are {len(records)} of them, by {', '.join(differ)}: take one, as in grads[0].{name} or "
                f"grads.select({first}).{name}"
            )
        return records[0]

    @property
    def input(self) -> Any:
        """dL/dx, (T, B, I) in the layout of the call's input. See LayerGradients.input."""
        return self._one("input").input

    @property
    def output(self) -> Any:
        """dL/dy, (T, B, P or H), the loss's own gradient of the output. See LayerGradients.output."""
        return self._one("output").output

    @property
    def hidden(self) -> Any:
        """dL/dh[t], (T, B, P or H), in total: own, and what came back through time. See LayerGradients.hidden."""
        return self._one("hidden").hidden

    @property
    def cell(self) -> Any:
        """dL/dc[t], (T, B, H), in total. See LayerGradients.cell."""
        return self._one("cell").cell

    @property
    def gates(self) -> Gates:
        """Gradients of the gates' pre-activations: .all (T, B, 4H), .i, .f, .g, .o. See LayerGradients.gates."""
        return self._one("gates").gates

    @property
    def h0(self) -> torch.Tensor:
        """dL/dh0, (B, P or H). See LayerGradients.h0."""
        return self._one("h0").h0

    @property
    def c0(self) -> torch.Tensor:
        """dL/dc0, (B, H). See LayerGradients.c0."""
        return self._one("c0").c0

    @overload
    def __getitem__(self, index: int) -> LayerGradients: ...
    @overload
    def __getitem__(self, index: slice) -> list[LayerGradients]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._some()[index]

    def __iter__(self) -> Iterator[LayerGradients]:
        return iter(self._records())

    def __len__(self) -> int:
        return len(self._records())

    def __repr__(self) -> str:
        records = self._records()
        if not records:
            return f"Gradients: {self._why_nothing()}"
        shown = [f"  [{k}] {r.name}: {r.steps} steps" for k, r in enumerate(records[:20])]
        more = [f"  .. and {len(records) - 20} more"] if len(records) > 20 else []
        ways = "  each has input, output, hidden, cell, gates, h0, c0; here are select, frame, summary, plot, log"
        return "\n".join([f"Gradients of {len(records)}:", *shown, *more, ways])

    def frame(self) -> pandas.DataFrame:
        """A row for each module, call, backward pass, layer, direction, quantity and step.

        quantity: input, output, hidden, cell, the gates i, f, g, o, h0, c0 (step -1). Columns: norm, mean, max (the
        largest magnitude), zeros and nonfinite (shares of the step's values, 0 to 1), saturated (the share of a gate's
        activations within 0.01 of an end of their range). input is the layer's: both directions' rows show the same.

        Raises RuntimeError if nothing was recorded, ImportError without pandas.
        """
        from triton_lstm.gradient_frame import frame

        return frame(self._some())

    def summary(self) -> str:
        """Per layer, in words: how far back the gradient reaches, the first NaN or infinity, and saturated gates.

        "It grows" is said only where more than twice as much comes back through time as the loss and the layers above
        asked of all the steps that it came from. Where several steps are asked for something, |dL/dh| is compared with
        that, too: how far back each of them is heard cannot be told from their sum.

        Raises RuntimeError if nothing was recorded.
        """
        from triton_lstm.gradient_words import summary

        return summary(self._some(), self._recording.modules if not self._chosen else [])

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """A picture: the norm of dL/dh over time, a heat map of layers and steps, and one of the gates.

        path: where to save it, as PNG or SVG by its ending. In a notebook the figure shows itself.
        Raises RuntimeError if nothing was recorded, ValueError for another ending, ImportError without matplotlib.
        """
        from triton_lstm.gradient_plot import plot

        return plot(self._some(), path)

    def log(self, writer: Any, step: int | None = None) -> None:
        """Scalars for TensorBoard: of every layer the norms over all steps, the share of NaN or infinity, the gates'
        saturation, and `reach`: the share of steps from the largest |dL/d(h, c)| back to the first under 1% of it,
        whatever the loss asks on the way. For the picture: writer.add_figure(.., grads.plot()).

        writer: a torch.utils.tensorboard.SummaryWriter, or what has its add_scalar(tag, value, step).
        Raises TypeError for another writer, RuntimeError if nothing was recorded.
        """
        from triton_lstm.gradient_words import log

        log(self._some(), writer, step)


@contextlib.contextmanager
def record_gradients(
    model: nn.Module, *, reduce: Literal["norm"] | None = None, steps: int | None = None
) -> Iterator[Gradients]:
    """Records the gradients inside every triton_lstm.LSTM of `model`, around forward and backward.

        with triton_lstm.record_gradients(model) as grads:
            loss_of(model(x)).backward()
        print(grads.summary())

    For each module, call, layer, direction and backward pass there is one `LayerGradients` in `grads`. The model's
    results and gradients are the same, bit for bit. Everything is kept until `grads` is gone: several tensors of the
    output's size for each layer and call.

    Args:
        model: with triton_lstm.LSTM modules in it, or one itself; wrapped by DistributedDataParallel or not.
        reduce: "norm" keeps statistics of each step only, in memory that grows with T alone.
        steps: the most time steps of which everything is kept; of longer calls, statistics only.

    Raises:
        TypeError, ValueError: a model that is none or has no such module; wrong reduce or steps.
        RuntimeError: a model compiled by torch.compile; a call under torch.compile or a transform of torch.func.
    """
    modules = _lstms(model)
    if reduce not in (None, "norm"):
        raise ValueError(f'reduce must be "norm" or None, got {reduce!r}')
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 0):
        raise ValueError(f"steps must be a whole number from 0 up, got {steps!r}")
    recording = Recording(list(modules), -1 if reduce else sys.maxsize if steps is None else steps)
    try:
        for name, module in modules.items():
            module._recordings = (*module._recordings, (recording, name))
        yield Gradients(recording)
    finally:
        for module in modules.values():
            rest = tuple(pair for pair in module._recordings if pair[0] is not recording)
            if rest:
                module._recordings = rest
            else:
                module.__dict__.pop("_recordings", None)
        recording.close()


def _lstms(model: nn.Module) -> dict[str, LSTM]:
    """The model's LSTMs by name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"record_gradients wants a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise RuntimeError(
                f"record_gradients hears no call inside torch.compile, and {name or 'the model'} is compiled. Record "
                "the model as it was before torch.compile (its _orig_mod)"
            )
    found = {
        name or type(module).__name__: module for name, module in model.named_modules() if isinstance(module, LSTM)
    }
    if not found:
        theirs = [name or "the model" for name, module in model.named_modules() if isinstance(module, nn.LSTM)]
        advice = f"; {', '.join(theirs)} is torch.nn.LSTM: triton_lstm.convert(model) first" if theirs else ""
        raise ValueError(f"there is no triton_lstm.LSTM in this {type(model).__name__}{advice}")
    return found
