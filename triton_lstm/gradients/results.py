"""Gradients: the result of a record_gradients block, to inspect, tabulate and plot."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from triton_lstm.gradients.layer import DIRECTIONS, Gates, LayerGradients
from triton_lstm.gradients.recorder import Recording

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

CHOICES = ("module", "call", "layer", "direction", "backward")


class Gradients(Sequence[LayerGradients]):
    """The gradients recorded by `record_gradients`: a sequence of `LayerGradients`.

    Sorted by module, call, backward pass, layer and direction. `select` filters it; if exactly one record is left, its
    `input`, `output`, `hidden`, `cell`, `gates`, `h0` and `c0` can be read directly from here. `frame`, `summary`,
    `plot` and `log` cover all records, or the selected ones.

    Raises:
        RuntimeError: on access if nothing was recorded, or if `input`, `output` etc. are read while there are several
            records.

    Example::

        import torch
        import triton_lstm

        lstm = triton_lstm.LSTM(8, 16, num_layers=2, bidirectional=True)
        with triton_lstm.record_gradients(lstm) as grads:
            lstm(torch.randn(5, 2, 8))[0].sum().backward()
        print(len(grads))  # 4: two layers, two directions
        top = grads.select(layer=-1, direction="forward")
        print(top.hidden.shape)  # (5, 2, 16)
        print(grads.summary())
    """

    def __init__(self, recording: Recording, chosen: dict[str, Any] | None = None) -> None:
        self._recording = recording
        self._chosen = chosen or {}

    def _records(self) -> list[LayerGradients]:
        found = []
        numbers = dict.fromkeys(self._recording.modules, -1)
        for call in (call for call in list(self._recording.calls) if call.is_numbered):
            numbers[call.module] += 1
            for layer, recorder in enumerate(call.layers):
                for number, backward in enumerate(recorder.passes):
                    place = call.module, numbers[call.module], layer, number
                    for direction in range(len(backward.saturated)):
                        found.append(LayerGradients(place, direction, backward, call.layout, call.steps))
        order = self._recording.modules.index
        found.sort(key=lambda r: (order(r.module), r.call, r.backward, r.layer, DIRECTIONS.index(r.direction)))
        return [r for r in found if all(getattr(r, name) == value for name, value in self._chosen.items())]

    def _nonempty(self) -> list[LayerGradients]:
        """The records. Raises RuntimeError, with the reason, if there are none."""
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
                f"no gradient was recorded: {names} was not called inside the block, or only with gradients disabled. "
                "Run the model, and backward() on its loss, inside `with record_gradients(model)`"
            )
        counts = ", ".join(f"{name!r} was called {n} time{'s' * (n > 1)}" for name, n in called.items())
        return (
            f"no gradient was recorded: {counts}, but no backward pass reached it inside the block. "
            "Call backward() on the loss inside it, and make sure that something requires a gradient"
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
        """Selects the records of one module, call, layer, direction and backward pass.

        Args:
            module: the module's name in the model.
            call, layer, backward: an index; negative ones count from the end.
            direction: "forward" or "reverse".

        Returns:
            The matching records. An argument that is None matches all.

        Raises:
            LookupError: if there is no match; the message lists the available values.
            RuntimeError: if nothing was recorded.

        Example::

            import torch
            import triton_lstm

            lstm = triton_lstm.LSTM(8, 16, num_layers=2)
            with triton_lstm.record_gradients(lstm) as grads:
                lstm(torch.randn(5, 2, 8))[0].sum().backward()
            print(grads.select(layer=-1).gates.f.shape)  # (5, 2, 16)
        """
        given = dict(zip(CHOICES, (module, call, layer, direction, backward), strict=True))
        records = self._nonempty()
        chosen = dict(self._chosen)
        for name, value in given.items():
            if value is None:
                continue
            there = list(dict.fromkeys(getattr(r, name) for r in records))
            if isinstance(value, int) and value < 0:
                value += max((n for n in there if isinstance(n, int)), default=0) + 1
            if value not in there:
                raise LookupError(
                    f"nothing was recorded for {name}={given[name]!r}; available: {', '.join(map(repr, there))}"
                )
            records = [r for r in records if getattr(r, name) == value]
            chosen[name] = value
        return Gradients(self._recording, chosen)

    def _one(self, name: str) -> LayerGradients:
        records = self._nonempty()
        if len(records) > 1:
            differ = [c for c in CHOICES if len({getattr(r, c) for r in records}) > 1]
            first = ", ".join(f"{c}={getattr(records[0], c)!r}" for c in differ)
            raise RuntimeError(
                f"there are {len(records)} records, which differ in {', '.join(differ)}: choose one, as in "
                f"grads[0].{name} or grads.select({first}).{name}"
            )
        return records[0]

    @property
    def input(self) -> Any:
        """dL/dx, (T, B, I), in the layout of the call's input. See LayerGradients.input."""
        return self._one("input").input

    @property
    def output(self) -> Any:
        """dL/dy, (T, B, P or H), the direct gradient of the output. See LayerGradients.output."""
        return self._one("output").output

    @property
    def hidden(self) -> Any:
        """dL/dh[t], (T, B, P or H), the total: direct and through time. See LayerGradients.hidden."""
        return self._one("hidden").hidden

    @property
    def cell(self) -> Any:
        """dL/dc[t], (T, B, H), the total. See LayerGradients.cell."""
        return self._one("cell").cell

    @property
    def gates(self) -> Gates:
        """Gradients of the gates' pre-activations: .all (T, B, 4H), .i, .f, .g, .o (T, B, H).
        See LayerGradients.gates."""
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
        return self._nonempty()[index]

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
        usage = "  per record: input, output, hidden, cell, gates, h0, c0; for all: select, frame, summary, plot, log"
        return "\n".join([f"Gradients, {len(records)} record{'s' * (len(records) > 1)}:", *shown, *more, usage])

    def frame(self) -> pandas.DataFrame:
        """Per-step statistics as a tidy DataFrame.

        Returns:
            One row per module, call, backward pass, layer, direction, quantity and step. Quantities: input, output,
            hidden, cell, the gates i, f, g, o, h0, c0 (step -1). Columns: norm, mean, max (largest magnitude), zeros
            and nonfinite (fractions of the step's values), begun (the fraction of the step's sequences in which a
            segment begins), saturated (the fraction of a gate's activations within 0.01
            of an end of their range). The directions of a layer share its input, so both show the same `input` rows.

        Raises:
            RuntimeError: if nothing was recorded.
            ImportError: if pandas is not installed.

        Example::

            import torch
            import triton_lstm

            lstm = triton_lstm.LSTM(8, 16)
            with triton_lstm.record_gradients(lstm) as grads:
                lstm(torch.randn(5, 2, 8))[0].sum().backward()
            frame = grads.frame()
            print(frame[frame.quantity == "hidden"].set_index("step").norm)
        """
        from triton_lstm.gradients.frame import frame

        return frame(self._nonempty())

    def summary(self) -> str:
        """A text summary per layer: how far back the gradient reaches, the first NaN or infinity, and saturated gates.

        A gradient is reported to grow only if more than twice as much flows back through time to a step as entered
        directly, from the loss and the layers above, at all the steps it came from. If gradients enter at several
        steps, `|dL/dh|` is also compared with these: how far back each of them reaches cannot be inferred from their
        sum.

        Raises:
            RuntimeError: if nothing was recorded.

        Example::

            import torch
            import triton_lstm

            lstm = triton_lstm.LSTM(8, 16)
            with triton_lstm.record_gradients(lstm) as grads:
                lstm(torch.randn(5, 2, 8))[0].sum().backward()
            print(grads.summary())
        """
        from triton_lstm.gradients.summary import summary

        return summary(self._nonempty(), self._recording.modules if not self._chosen else [])

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Plots the norm of dL/dh over time, and heat maps of layers and gates over time steps.

        Args:
            path: where to save the figure, .png or .svg. Default: None, do not save.

        Returns:
            The matplotlib figure, which a notebook displays by itself.

        Raises:
            RuntimeError: if nothing was recorded.
            ValueError: if `path` has another suffix.
            ImportError: if matplotlib is not installed.

        Example::

            import torch
            import triton_lstm

            lstm = triton_lstm.LSTM(8, 16)
            with triton_lstm.record_gradients(lstm) as grads:
                lstm(torch.randn(5, 2, 8))[0].sum().backward()
            grads.plot("gradients.png")
        """
        from triton_lstm.gradients.plot import plot

        return plot(self._nonempty(), path)

    def log(self, writer: Any, step: int | None = None) -> None:
        """Writes scalars to TensorBoard.

        Per layer: norms over all steps, the fraction of NaN or infinity, the saturation of each gate, and `reach`: the
        fraction of the steps between the largest `|dL/d(h, c)|` and the first one below 1% of it, whatever gradients
        enter in between. For the figure, use writer.add_figure(.., grads.plot()).

        Args:
            writer: a torch.utils.tensorboard.SummaryWriter, or an object with its add_scalar(tag, value, step).
            step: the global step, passed on to add_scalar.

        Raises:
            TypeError: if `writer` has no add_scalar method.
            RuntimeError: if nothing was recorded.

        Example::

            import torch.utils.tensorboard
            import triton_lstm

            lstm = triton_lstm.LSTM(8, 16)
            with triton_lstm.record_gradients(lstm) as grads:
                lstm(torch.randn(5, 2, 8))[0].sum().backward()
            with torch.utils.tensorboard.SummaryWriter() as writer:  # in ./runs
                grads.log(writer, step=0)
        """
        from triton_lstm.gradients.summary import log

        log(self._nonempty(), writer, step)
