"""docs/explanation/time_loop.md and exchanges.md: programs over steps, waiting for each other, and split sums."""

from typing import Any

from matplotlib.figure import Figure
from style import BLACK, BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, SKY, WHITE, arrow, box, canvas, label

PROGRAMS = (BLUE, GREEN, PURPLE)
LANE, TOP = 1.25, 3.7  # between programs; the first one's middle
STEP, FIRST, WIDE, HIGH = 2.05, 2.55, 0.95, 0.66  # between steps; the first one's left; a step's box


def time_loop() -> Figure:
    figure, axes = canvas(5.0, 8.9, 5.34)
    for p, color in enumerate(PROGRAMS):
        y = TOP - LANE * p
        label(axes, 0.12, y + 0.3, f"program {p}", ha="left", weight="bold", color=color)
        box(axes, 0.12, y - 0.33, 1.95, 0.46, "its rows of W_hh", facecolor=color, edgecolor=color)
        axes.plot([2.07, 8.8], [y - 0.1, y - 0.1], color=color, lw=2, zorder=0)
        for t in range(3):
            _step(axes, FIRST + STEP * t, y, p, t)
    for t in range(3):
        _exchanged(axes, FIRST + STEP * t + WIDE + 0.32, t)
    label(axes, 1.1, 4.5, "loaded once, stays on chip", size=8.5)
    for t in range(3):
        x = FIRST + STEP * t + WIDE / 2
        label(axes, x, 5.1, f"step {t}", weight="bold")
        label(axes, x, 4.68, f"xg[{t}]", size=8.5)
        arrow(axes, (x, 4.54), (x, TOP + HIGH / 2))
    label(
        axes,
        4.45,
        0.2,
        "one launch runs all steps; the line through a program is c, which stays in its registers",
        size=8.5,
    )
    return figure


def _step(axes: Any, x: float, y: float, p: int, t: int) -> None:
    color = PROGRAMS[p]
    box(axes, x, y - HIGH / 2, WIDE, HIGH, "product\ncell", edgecolor=color, lw=1.6)
    strip = x + WIDE + 0.32
    part = TOP + 0.55 - (p + 0.5) * 1.2
    arrow(axes, (x + WIDE, y), (strip, part), color)
    if t < 2:
        for source in range(len(PROGRAMS)):
            height = TOP + 0.55 - (source + 0.5) * 1.2
            arrow(axes, (strip + 0.36, height), (x + STEP, y), GREY, lw=0.8, mutation_scale=7)


def _exchanged(axes: Any, x: float, t: int) -> None:
    """h[t] in L2, a part from each program."""
    for p, color in enumerate(PROGRAMS):
        box(axes, x, TOP + 0.55 - (p + 1) * 1.2, 0.36, 1.2, facecolor=color, edgecolor=WHITE, rounding=0)
    label(axes, x + 0.18, TOP + 0.74, f"h[{t}]", size=8.5)
    label(axes, x + 0.18, TOP + 0.55 - 3.6 - 0.2, "in L2", size=8.5, color=GREY)


def exchange() -> Figure:
    """What a program that has stored h[t] and one that waits for it do, from left to right."""
    figure, axes = canvas(4.6, 8.9, 4.91)
    cell, stored, told, looks = (
        ("cell", 0.75, PALE),
        ("store h", 0.65, SKY),
        ("add 1", 0.6, BLUE),
        "look at the counter",
    )
    loaded, product = ("load h", 1.1, SKY), ("product", 1.2, GREEN)
    fence, acquire, again = ("fence", 1.35, ORANGE), ("acquire", 0.75, ORANGE), ("a NaN? again", 1.0, PURPLE)
    _timeline(axes, 3.9, "barrier", (cell, stored, fence, told), ((looks, 3.65, PALE), acquire, loaded, product))
    _timeline(axes, 1.75, "flag", (cell, stored, told), ((looks, 2.3, PALE), loaded, again, product))
    label(axes, 4.45, 0.2, "time; lengths are schematic", size=8.5, color=GREY)
    return figure


def _timeline(axes: Any, y: float, name: str, one: Any, other: Any) -> None:
    """one, other: what, how long, and its colour. One ends with telling, other begins with looking."""
    left = 1.75
    label(axes, 0.12, y + 0.55, f"{name} exchange", ha="left", weight="bold")
    for height, who, parts in ((y, "one that tells", one), (y - 0.95, "one that waits", other)):
        label(axes, 0.12, height + 0.05, who, ha="left", size=8.5)
        start = left
        for text, length, color in parts:
            box(axes, start, height - 0.19, length, 0.48, text, facecolor=color, edgecolor=WHITE, rounding=0)
            start += length
    told, seen = left + sum(length for _, length, _ in one) - 0.3, left + other[0][1]
    arrow(axes, (told, y - 0.2), (seen, y - 0.64), BLACK)
    label(axes, seen + 0.1, y - 0.38, "seen", size=8, color=GREY, ha="left")


def split_sums() -> Figure:
    """W_hh (4H, H) as two plans divide it among eight programs."""
    figure, axes = canvas(4.6, 8.9, 4.91)
    for x, splits, title, note in (
        (1.5, 1, "one axis", "a program reads all 4H gradients\nand has the whole sum of its units"),
        (5.9, 4, "split 4", "a program reads a quarter of them, and adds\nfour parts of the sums of its units"),
    ):
        label(axes, x + 0.6, 4.65, title, weight="bold")
        label(axes, x + 0.6, 0.35, note, size=8.5)
        label(axes, x - 0.8, 4.25, "dgates[t+1]", size=8)
        label(axes, x + 1.2, 4.25, "W_hh: 4H terms, H units", size=8)
        label(axes, x - 0.28, 2.8, "@", size=11)
        label(axes, x - 0.28, 0.98, "= dh[t]", size=8, ha="right")
        _divided(axes, x, splits, 8 // splits)
    return figure


def _divided(axes: Any, x: float, splits: int, blocks: int) -> None:
    height, width, top, own = 2.6 / splits, 2.4 / blocks, 4.05, 2.4 / 8
    for row in range(splits):
        color = SKY if row == 0 else PALE
        y = top - (row + 1) * height
        box(axes, x - 1.05, y, 0.5, height, facecolor=color, edgecolor=GREY, lw=0.8, rounding=0)
        for column in range(blocks):
            color = BLUE if row == column == 0 else PALE
            box(axes, x + column * width, y, width, height, facecolor=color, edgecolor=GREY, lw=0.8, rounding=0)
    for unit in range(8):
        color = BLUE if unit == 0 else PALE
        box(axes, x + unit * own, 0.84, own, 0.28, facecolor=color, edgecolor=GREY, lw=0.8, rounding=0)
    for row in range(splits):  # the parts of the first program's sums
        shift = own * (0.5 if splits == 1 else 0.2 + 0.2 * row)
        y = top - (row + (1 if splits == 1 else 0.5)) * height
        arrow(axes, (x + shift, y), (x + shift, 1.13), ORANGE, mutation_scale=8)
