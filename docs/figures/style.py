"""How the pictures look, and what they are drawn from: boxes, arrows and labels."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

# Okabe and Ito's colours but for the purple, whose text is darker: colour-blind people can tell them apart
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#AA4499", "#56B4E9"
RED, BLACK, GREY, PALE, WHITE = "#D55E00", "#222222", "#777777", "#f2f2f2", "white"
WIDTH = 8.33  # inches: 800 pixels

matplotlib.rcParams.update(
    {
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "svg.fonttype": "path",  # looks alike wherever it is shown
        "svg.hashsalt": "triton_lstm",  # the same ids in every run
    }
)


def save(figure: Figure, path: Path) -> None:
    """The same bytes in every run with one version of matplotlib."""
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def canvas(height: float, width: float, tall: float) -> tuple[Figure, Any]:
    """A figure of so many inches, and axes without lines: width x tall units, of the same length in both directions
    where these have the proportions of the figure."""
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, tall))
    axes.axis("off")
    return figure, axes


def box(
    axes: Any, x: float, y: float, width: float, height: float, text: str = "", *, size: float = 8.5, **style: Any
) -> None:
    """With its lower left corner at (x, y). style: of the patch; rounding: of its corners, as a share of its size."""
    style = dict(facecolor="white", edgecolor=BLACK, lw=1.0) | style
    rounding = min(width, height) * style.pop("rounding", 0.08)
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=f"round,pad=0,rounding_size={rounding}", **style))
    if text:
        color = WHITE if style["facecolor"] in (BLUE, GREEN, PURPLE, RED) else BLACK
        label(axes, x + width / 2, y + height / 2, text, size=size, color=color)


def label(axes: Any, x: float, y: float, text: str, **style: Any) -> None:
    axes.text(x, y, text, **(dict(ha="center", va="center", color=BLACK, linespacing=1.3) | style))


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], color: str = GREY, **style: Any) -> None:
    chosen = dict(arrowstyle="-|>", mutation_scale=11, lw=1.4, shrinkA=0, shrinkB=0) | style
    axes.add_patch(FancyArrowPatch(start, end, color=color, **chosen))
