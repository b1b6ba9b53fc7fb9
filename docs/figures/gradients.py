"""docs/gradients.md: which gradient is where, and how far one reaches back."""

from typing import Any

import torch
from matplotlib.figure import Figure
from style import BLACK, BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, RED, SKY, WIDTH, arrow, box, canvas, label

import triton_lstm

STEPS = 4
FIRST, APART = 1.75, 1.63  # where steps are, from left to right
OUTPUT, HIDDEN, CELL, INPUT = 5.0, 3.75, 1.85, 0.55  # and their parts, from below


def gradient_flow() -> Figure:
    """An unrolled LSTM: grey arrows are values, coloured ones beside them their gradients."""
    figure, axes = canvas(6.1, 8.9, 6.5)
    for t in range(STEPS):
        _step(axes, FIRST + APART * t, t)
        _between(axes, FIRST + APART * t, t)
    x = FIRST + APART * STEPS
    for y, name, left, color in ((HIDDEN, "h_n", 0.35, ORANGE), (CELL, "c_n", 0.46, GREEN)):
        box(axes, x - 0.35, y - 0.19, 0.7, 0.38, name, facecolor=PALE, edgecolor=GREY)
        arrow(axes, (x - APART + left, y + 0.09), (x - 0.37, y + 0.09))
        arrow(axes, (x - 0.35, y - 0.09), (x - APART + left + 0.02, y - 0.09), color, lw=2)
        label(axes, x, y - 0.36, f"dL/d{name}", size=8.5)
    _names(axes)
    return figure


def _step(axes: Any, x: float, t: int) -> None:
    arrow(axes, (x - 0.16, INPUT + 0.2), (x - 0.16, CELL - 0.4))
    arrow(axes, (x - 0.16, CELL + 0.4), (x - 0.16, HIDDEN - 0.2))
    arrow(axes, (x - 0.16, HIDDEN + 0.2), (x - 0.16, OUTPUT - 0.2))
    for low, high, color, text in (
        (HIDDEN + 0.2, OUTPUT - 0.2, BLUE, f"dL/dy[{t}]"),
        (CELL + 0.4, HIDDEN - 0.2, ORANGE, f"dL/dh[{t}]"),
        (INPUT + 0.2, CELL - 0.4, SKY, f"dL/dx[{t}]"),
    ):
        arrow(axes, (x + 0.12, high), (x + 0.12, low), color, lw=2)
        label(axes, x + 0.2, (low + high) / 2 + (-0.33 if color == ORANGE else 0), text, ha="left", size=8.5)
    box(axes, x - 0.35, OUTPUT - 0.19, 0.7, 0.38, f"y[{t}]", facecolor=PALE, edgecolor=GREY)
    box(axes, x - 0.35, HIDDEN - 0.19, 0.7, 0.38, f"h[{t}]", facecolor=PALE, edgecolor=GREY)
    box(axes, x - 0.35, INPUT - 0.19, 0.7, 0.38, f"x[{t}]", facecolor=PALE, edgecolor=GREY)
    box(axes, x - 0.46, CELL - 0.4, 0.92, 0.8, facecolor="white", lw=1.3)
    label(axes, x, CELL + 0.24, f"step {t}")
    label(axes, x, CELL, f"dL/dc[{t}]", color=GREEN, weight="bold", size=8)
    label(axes, x, CELL - 0.24, f"dgates[{t}]", color=PURPLE, weight="bold", size=8)


def _between(axes: Any, x: float, t: int) -> None:
    """From the step before, or from the initial states."""
    before = x - APART
    right, cell = before + 0.35, before + 0.46
    if t == 0:
        right = cell = 0.75
        for y, name in ((HIDDEN, "h0"), (CELL, "c0")):
            box(axes, 0.1, y - 0.19, 0.65, 0.38, name, facecolor=PALE, edgecolor=GREY)
            label(axes, 0.42, y - 0.36, f"dL/d{name}", size=8.5)
    # h goes down into the step, its gradient comes up from there
    arrow(axes, (right, HIDDEN - 0.1), (x - 0.44, CELL + 0.42))
    arrow(axes, (x - 0.3, CELL + 0.4), (right + 0.02, HIDDEN + 0.05), ORANGE, lw=2)
    arrow(axes, (cell, CELL + 0.09), (x - 0.48, CELL + 0.09))
    arrow(axes, (x - 0.46, CELL - 0.09), (cell + 0.02, CELL - 0.09), GREEN, lw=2)


def _names(axes: Any) -> None:
    """What record_gradients calls them."""
    names = (
        (BLUE, "output: dL/dy[t], direct"),
        (ORANGE, "hidden: dL/dh[t], direct + through step t+1"),
        (GREEN, "cell: dL/dc[t], total"),
        (PURPLE, "gates: dgates[t], before the nonlinearities"),
        (SKY, "input: dL/dx[t]"),
    )
    places = ((0.3, 6.15), (2.85, 6.15), (6.6, 6.15), (2.85, 5.8), (0.3, 5.8))
    for (color, text), (x, y) in zip(names, places, strict=True):
        axes.plot([x, x + 0.22], [y, y], color=color, lw=4, solid_capstyle="butt")
        label(axes, x + 0.3, y, text, ha="left", size=8.5, color=BLACK)


def gradient_norms() -> Figure:
    """A loss on the last step alone: where it enters the layer, and where it reaches through time."""
    torch.manual_seed(0)
    lstm = triton_lstm.LSTM(8, 32)
    x = torch.randn(16, 4, 8)
    with triton_lstm.record_gradients(lstm) as grads:
        output, _ = lstm(x)
        output[-1].square().sum().backward()
    layer = grads.select(layer=0)
    norms = [gradient.flatten(1).norm(dim=1).tolist() for gradient in (layer.output, layer.hidden)]
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = "grads.output: |dL/dy[t]|, direct", "grads.hidden: |dL/dh[t]|, total"
    lowest = min(norm for norm in norms[1] if norm)
    for axes, values, title, color in zip(panels, norms, titles, (BLUE, ORANGE), strict=True):
        axes.set(yscale="log", title=title, xlabel="step t", xlim=(-0.7, len(values) - 0.3))
        floor = lowest / 6
        axes.set_ylim(floor, max(norms[1]) * 3)
        for t, value in enumerate(values):
            if value:
                axes.bar(t, value - floor, bottom=floor, width=0.7, color=color)
            else:
                axes.plot(t, floor, marker="o", ms=5, mfc="white", mec=RED, clip_on=False, zorder=5)
        axes.grid(axis="y", alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("norm over the batch and units")
    panels[0].plot([], [], marker="o", ms=5, mfc="white", mec=RED, linestyle="none", label="exactly zero")
    panels[0].legend(loc="upper left", frameon=False)
    return figure
