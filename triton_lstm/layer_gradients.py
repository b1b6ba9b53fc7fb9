"""What a backward pass left in one layer, in the layout of the user's input."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import PackedSequence

from triton_lstm.layout import Layout
from triton_lstm.record import Pass, of_rows
from triton_lstm.statistics import StepStatistics

DIRECTIONS = ("forward", "reverse")
MEANING = {
    "input": "dL/dx[t], of the layer's input",
    "output": "dL/dy[t], what the loss and the layers above ask of the output; not what comes back through time",
    "hidden": "dL/dh[t], all of it: the output's, h_n's at the end, and what comes back through time",
    "cell": "dL/dc[t], all of it",
    "gates": "gradients of the pre-activations, i f g o side by side; gates.i, .f, .g, .o",
    "h0": "dL/dh0",
    "c0": "dL/dc0",
}


class Gates(NamedTuple):
    """Gradients of the four gates' pre-activations, each (.., H), and all of them side by side (.., 4H)."""

    i: Any
    f: Any
    g: Any
    o: Any
    all: Any

    def __repr__(self) -> str:
        return f"Gates: i, f, g, o {_shape(self.i)} each, all {_shape(self.all)}"


class LayerGradients:
    """What one backward pass left in one direction of one layer, in one call of one module.

    `input`, `output`, `hidden`, `cell` and `gates` have a row for every time step t and lie as the call's input did:
    (T, B, ..), (B, T, ..) with batch_first, (T, ..) unbatched, a PackedSequence, or padded with zeros after `lengths`.
    Step t of the reverse direction is step t of the input, too. They are of the dtype that the layer computed in;
    `hidden` and `cell` of float32, or float64 for float64.

    Attributes:
        module: the module's name in the model, or its class's name if it is the model.
        call: 0 for the module's first call inside the block, 1 for the second, .. Reentrant checkpoints are numbered in
            the order in which the backward pass calls them again.
        layer: 0 up. direction: "forward" or "reverse" in time. directions: of the layer, 1 or 2.
        backward: 0 for the first backward pass through this call, 1 for the second, ..
        steps: T, or the largest of `lengths`. lengths: (B,) on the CPU, or None where all sequences have T steps.
        every_element: False where only `statistics` were kept, because of reduce="norm" or steps=.
        saturated: (T, 4), the share of the gates i, f, g, o that are within 0.01 of an end of their range.
        asked: (T,) float64, the norm of what the loss and the layers above ask of each step itself: of its h, of h_n
            and c_n at the end, and of c and the gates where they were returned. The rest came back through time.
    """

    def __init__(
        self, place: tuple[str, int, int, int], direction: int, backward: Pass, layout: Layout, steps: int
    ) -> None:
        self.module, self.call, self.layer, self.backward = place
        self.direction = DIRECTIONS[direction]
        self.directions = len(backward.saturated)
        self.steps = steps
        self.lengths = layout.lengths
        self.every_element = bool(backward.rows)
        self._layout = layout
        self._rows = backward.rows[direction] if backward.rows else {}
        self._statistics = {} if backward.rows else backward.statistics[direction]
        self._starts = backward.starts
        self.saturated = backward.saturated[direction]
        self.asked = backward.asked[direction]

    @property
    def name(self) -> str:
        """Where it was recorded, in words."""
        again = f", backward pass {self.backward}" if self.backward else ""
        return f"{self.module!r}, call {self.call}, layer {self.layer}, {self.direction}{again}"

    def _get(self, name: str) -> torch.Tensor:
        if not self.every_element:
            raise RuntimeError(
                f"of {self.name} only norms were recorded ({self.steps} steps), not {name} itself. See frame() or "
                "statistics(), or record without reduce= and with steps= at least as large"
            )
        return self._rows[name]

    @property
    def input(self) -> Any:
        """dL/dx, (T, B, I): the gradient of this layer's input. Of the layer: its directions share one."""
        return self._layout.rows(self._get("input"))

    @property
    def output(self) -> Any:
        """dL/dy, (T, B, P or H): the loss's own gradient of the output, what `output.grad` would be if it were kept.

        Of this direction's features; for a lower layer, what the layers above ask of it. Zero where nobody looks.
        """
        return self._layout.rows(self._get("output"))

    @property
    def hidden(self) -> Any:
        """dL/dh[t], (T, B, P or H), in total: `output`, h_n's gradient at the last step, and what came back from the
        steps after t: dgates[t+1] @ W_hh."""
        return self._layout.rows(self._get("hidden"))

    @property
    def cell(self) -> Any:
        """dL/dc[t], (T, B, H), in total: through h[t], through c[t+1], and c_n's gradient at the last step."""
        return self._layout.rows(self._get("cell"))

    @property
    def gates(self) -> Gates:
        """Gradients of the gates' pre-activations: gates.all (T, B, 4H), and by name gates.i, .f, .g, .o (T, B, H)."""
        every = self._get("gates")
        i, f, g, o = (self._layout.rows(part) for part in every.chunk(4, -1))
        return Gates(i, f, g, o, self._layout.rows(every))

    @property
    def h0(self) -> torch.Tensor:
        """dL/dh0, (B, P or H), or (P or H,) unbatched; also where no h0 was given, for the zeros in its place."""
        return self._layout.state(self._get("h0"))

    @property
    def c0(self) -> torch.Tensor:
        """dL/dc0, (B, H), or (H,) unbatched; also where no c0 was given."""
        return self._layout.state(self._get("c0"))

    def statistics(self) -> dict[str, StepStatistics]:
        """Norm, mean, largest magnitude, share of zeros and of non-finite values at each step: (T,) each, float64.

        By quantity: input, output, hidden, cell, the gates i, f, g, o, and h0 and c0 of one step.
        """
        if self.every_element:
            return of_rows(self._rows, self._starts)
        return self._statistics

    def __repr__(self) -> str:
        lines = [f"Gradients of {self.name}: {self.steps} steps"]
        for name, meaning in MEANING.items():
            kept = "norms" if not self.every_element else ""
            if self.every_element:
                value = getattr(self, name)
                value = value.all if name == "gates" else value
                dtype = str((value.data if isinstance(value, PackedSequence) else value).dtype).removeprefix("torch.")
                kept = f"{_shape(value)} {dtype}"
            lines.append(f"  {name:<6}  {kept}  {meaning}")
        return "\n".join(lines)


def _shape(value: Any) -> str:
    return f"packed {tuple(value.data.shape)}" if isinstance(value, PackedSequence) else str(tuple(value.shape))
