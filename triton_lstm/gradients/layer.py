"""The gradients recorded in one layer during one backward pass, in the layout of the call's input."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import PackedSequence

from triton_lstm.core.layout import Layout
from triton_lstm.gradients.recorder import Pass
from triton_lstm.gradients.statistics import StepStatistics, of_rows

DIRECTIONS = ("forward", "reverse")
MEANING = {
    "input": "dL/dx[t], of the layer's input",
    "output": "dL/dy[t], direct: from the loss and the layers above, not through time",
    "hidden": "dL/dh[t], total: direct, from h_n at the last step, and through time",
    "cell": "dL/dc[t], total",
    "gates": "gradients of the pre-activations, i f g o concatenated; gates.i, .f, .g, .o",
    "h0": "dL/dh0",
    "c0": "dL/dc0",
}


class Gates(NamedTuple):
    r"""Gradients of the gates' pre-activations a.

    .. math::
        da^i_t &= (dc_t \odot g_t + di_t) \odot i_t (1 - i_t) \\
        da^f_t &= (dc_t \odot c_{t-1} + df_t) \odot f_t (1 - f_t) \\
        da^g_t &= (dc_t \odot i_t + dg_t) \odot (1 - g_t^2) \\
        da^o_t &= (dh_t \odot \tanh(c_t) + do_t) \odot o_t (1 - o_t)

    dh and dc are `LayerGradients.hidden` (times W_hr with a projection) and `cell`; di to do are the gates' own
    gradients, if they were returned. Where a segment begins, c_{t-1} is zero.

    Attributes:
        i, f, g, o: gradient of each gate's pre-activation, (T, B, H) in the layout of the call's input.
        all: the four of them concatenated, (T, B, 4H). All have the dtype in which the layer computed.

    Example::

        import torch
        import triton_lstm

        lstm = triton_lstm.LSTM(8, 16)
        with triton_lstm.record_gradients(lstm) as grads:
            lstm(torch.randn(5, 2, 8))[0].sum().backward()
        print(grads.gates.f.shape, grads.gates.all.shape)  # (5, 2, 16), (5, 2, 64)
    """

    i: Any
    f: Any
    g: Any
    o: Any
    all: Any

    def __repr__(self) -> str:
        return f"Gates: i, f, g, o {_shape(self.i)} each, all {_shape(self.all)}"


class LayerGradients:
    """The gradients in one direction of one layer, from one backward pass through one call of a module.

    `input`, `output`, `hidden`, `cell` and `gates` use the layout of the call's input: (T, B, ..), (B, T, ..) with
    batch_first, (T, ..) unbatched, a PackedSequence, or padded with zeros beyond `lengths`. Index t is time step t of
    the input, in the reverse direction too. `hidden` and `cell` are float32, or float64 if the layer is; the others
    have the dtype in which the layer computed.

    Attributes:
        module: the module's name in the model, or its class name if it is the model itself.
        call: 0 for the module's first call inside the block, 1 for the second, and so on. Calls under reentrant
            checkpointing are numbered in the order in which the backward pass recomputes them.
        layer: index of the layer, from 0.
        direction: "forward" or "reverse".
        directions: number of directions of the layer, 1 or 2.
        backward: 0 for the first backward pass through this call, 1 for the second, and so on.
        steps: T, or the largest of `lengths`.
        lengths: (B,) int64 on the CPU, or None if all sequences have T steps.
        every_element: False if only `statistics` were kept, because of reduce="norm" or steps=.
        saturated: (T, 4), the fraction of the gates i, f, g, o within 0.01 of an end of their range.
        asked: (T,) float64, the norm of the gradient that enters directly at each step, from the loss and the layers
            above: through y, through h_n and c_n at the last step, and through c and the gates if they were returned.
            The rest comes back through time.
        begun: (T,) float64, the fraction of each step's sequences in which a segment begins there, because of resets or
            cu_seqlens, or None: no gradient flows from such a step to the one before it.

    Raises:
        RuntimeError: on access to a quantity of which only statistics were kept.

    Example::

        import torch
        import triton_lstm

        lstm = triton_lstm.LSTM(8, 16)
        with triton_lstm.record_gradients(lstm) as grads:
            lstm(torch.randn(5, 2, 8))[0].sum().backward()
        layer = grads[0]
        print(layer.output.shape, layer.h0.shape)  # (5, 2, 16), (2, 16)
        print(layer.statistics()["hidden"].norm)  # one value per time step
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
        self.begun = backward.begun

    @property
    def name(self) -> str:
        """A description of where it was recorded."""
        again = f", backward pass {self.backward}" if self.backward else ""
        return f"{self.module!r}, call {self.call}, layer {self.layer}, {self.direction}{again}"

    def _get(self, name: str) -> torch.Tensor:
        if not self.every_element:
            raise RuntimeError(
                f"only norms were recorded for {self.name} ({self.steps} steps), not {name} itself. Use frame() or "
                f"statistics(), or record without reduce= and with steps= at least {self.steps}"
            )
        return self._rows[name]

    @property
    def input(self) -> Any:
        """dL/dx, (T, B, I): the gradient of this layer's input, which its directions share."""
        return self._layout.rows(self._get("input"))

    @property
    def output(self) -> Any:
        """dL/dy, (T, B, P or H): the direct gradient of the output, what `output.grad` would be if it were retained.

        This direction's features only; for a lower layer, the gradient from the layers above. Zero at steps whose
        output is not used.
        """
        return self._layout.rows(self._get("output"))

    @property
    def hidden(self) -> Any:
        """dL/dh[t], (T, B, P or H), the total: `output`, the gradient of h_n at the last step, and what comes back
        from the following step, dgates[t+1] @ W_hh."""
        return self._layout.rows(self._get("hidden"))

    @property
    def cell(self) -> Any:
        r"""dL/dc[t], (T, B, H), the total: through h[t] and c[t+1], of c_n at the last step, and of c[t] if returned.

        .. math:: dc_t = dh_t \odot o_t \odot (1 - \tanh^2 c_t) + dc_{t+1} \odot f_{t+1} + \partial L / \partial c_t

        With a projection dh[t] @ W_hr takes the place of dh[t]. The second term is zero where a segment begins at t+1,
        which is the step that the direction takes after t.
        """
        return self._layout.rows(self._get("cell"))

    @property
    def gates(self) -> Gates:
        """Gradients of the gates' pre-activations: gates.i, .f, .g, .o (T, B, H) and gates.all (T, B, 4H)."""
        every = self._get("gates")
        i, f, g, o = (self._layout.rows(part) for part in every.chunk(4, -1))
        return Gates(i, f, g, o, self._layout.rows(every))

    @property
    def h0(self) -> torch.Tensor:
        """dL/dh0, (B, P or H), or (P or H,) unbatched; if no h0 was given, the gradient of the default zeros."""
        return self._layout.state(self._get("h0"))

    @property
    def c0(self) -> torch.Tensor:
        """dL/dc0, (B, H), or (H,) unbatched; if no c0 was given, the gradient of the default zeros."""
        return self._layout.state(self._get("c0"))

    def statistics(self) -> dict[str, StepStatistics]:
        """Per-step statistics of each quantity.

        Returns:
            A dict from the quantity to `StepStatistics`: input, output, hidden, cell and the gates i, f, g, o with
            (T,) values, h0 and c0 with (1,).

        Example::

            import torch
            import triton_lstm

            lstm = triton_lstm.LSTM(8, 16)
            with triton_lstm.record_gradients(lstm) as grads:
                lstm(torch.randn(5, 2, 8))[0].sum().backward()
            print(grads[0].statistics()["hidden"].norm.shape)  # (5,)
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
