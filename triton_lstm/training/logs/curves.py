"""The losses of runs as a figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from triton_lstm.gradients.plot import COLOURS, ODD, STYLES
from triton_lstm.settings import UsageError
from triton_lstm.system.atomic_file import atomic_write
from triton_lstm.system.terminal import plain
from triton_lstm.training.logs.runs import Run, differing, frame, shown

LOSSES = {"loss": "loss", "validation_loss": "validation loss"}
COLUMNS = ("tokens", *LOSSES)  # of metrics.csv, which are shown
SHOWN = len(COLOURS) * len(STYLES)  # runs at most; the title gives the total
POINTS = 2000  # of a curve at most
SMOOTHED = 30  # a smoothed loss averages over about this share of the curve
DECADES = 2  # of the losses, above which their scale is logarithmic
FEW = 60  # points, up to which each one has a marker
SUFFIXES = (".png", ".svg", ".pdf")


def draw(runs: Sequence[Run]) -> Figure:
    """A figure of the losses over steps and over tokens: a smoothed line above a pale one with every value, and the
    validation loss if a run has one. Red crosses mark NaN and infinity.

    Raises UsageError if no run has a loss.
    """
    chosen = [run for run in runs if any(len(run.logged.get(name, ())) for name in LOSSES)]
    if not chosen:
        raise UsageError("there is nothing to plot: none of the runs has logged a loss yet")
    total, chosen = len(chosen), chosen[:SHOWN]
    rows = [name for name in LOSSES if any(len(run.logged.get(name, ())) for run in chosen)]
    figure = Figure(figsize=(11, 0.8 + 3.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False, sharey="row")
    styles: list[dict[str, Any]] = [dict(linestyle=style, color=colour) for style in STYLES for colour in COLOURS]
    for row, name in zip(axes, rows, strict=True):
        for run, style in zip(chosen, styles, strict=False):
            values = run.logged.get(name, pd.Series(dtype=float))
            for panel, x in zip(row, (values.index.to_numpy(), _tokens(run, values.index)), strict=True):
                _curve(panel, x, values, style, smoothed=name == "loss")
        for panel, over in zip(row, ("steps", "tokens"), strict=True):
            panel.set(xlabel=over, ylabel=f"{LOSSES[name]} (nats per token)", title=f"{LOSSES[name]} over {over}")
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
            panel.grid(alpha=0.3)
        _scale(row[0], [run.logged[name] for run in chosen if name in run.logged])
    lines = [Line2D([], [], lw=1.5, **style) for _, style in zip(chosen, styles, strict=False)]
    names = list(labels(chosen))
    if not all(np.isfinite(run.logged[name]).all() for run in chosen for name in rows if name in run.logged):
        odd: dict[str, Any] = ODD
        lines.append(Line2D([], [], **odd))
        names.append("NaN or infinity")
    figure.legend(lines, names, loc="outside lower center", ncols=1 if max(map(len, names)) > 40 else 3, fontsize=7)
    if len(chosen) < total:
        figure.suptitle(f"{len(chosen)} of {total} runs")
    return figure


def labels(runs: Sequence[Run]) -> Iterator[str]:
    """A name per run, with the values of its configuration that others do not share."""
    values = differing(runs)
    for k, name in enumerate(frame(runs)["run"]):
        parts = [f"{field}={shown(column[k])}" for field, column in values.items()]
        text = plain(f"{name}: {', '.join(parts)}" if parts else name)
        text = text if len(text) <= 120 else f"{text[:117]}..."
        # matplotlib leaves out labels with a leading underscore, and reads formulas between dollar signs
        yield f"{' ' * text.startswith('_')}{text}".replace("$", r"\$")


def save(figure: Figure, path: Path) -> None:
    """Writes the figure atomically, in the format of the path's suffix, one of SUFFIXES."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format=path.suffix[1:].lower())


def _tokens(run: Run, steps: pd.Index) -> Any:
    """How many tokens were seen at these steps; NaN if that was not logged."""
    tokens = run.logged.get("tokens", ())
    if not len(tokens):
        return np.full(len(steps), np.nan)
    return np.interp(steps, tokens.index, tokens)


def _curve(axes: Any, x: Any, values: pd.Series, style: dict[str, Any], *, smoothed: bool) -> None:
    y = values.to_numpy()
    finite = np.isfinite(y)
    odd = x[~finite]
    odd = odd[:: len(odd) // POINTS + 1]
    axes.plot(odd, np.full(len(odd), 0.02), ms=5, transform=axes.get_xaxis_transform(), **ODD)
    x, y = x[finite], y[finite]
    marker = "o" if len(y) <= FEW else ""
    if not smoothed:
        kept = _thinned(y)
        axes.plot(x[kept], y[kept], lw=1.2, marker=marker, ms=3, **style)
        return
    kept = _thinned(y)
    axes.plot(x[kept], y[kept], lw=0.8, alpha=0.3, **style)
    smooth = _smoothed(y)
    kept = _thinned(smooth)
    axes.plot(x[kept], smooth[kept], lw=1.5, **style)


def _smoothed(y: Any) -> Any:
    """The mean of the exponential averages of what comes before and after: it does not lag behind."""
    span = max(1, len(y) / SMOOTHED)
    before, after = (pd.Series(part).ewm(span=span).mean().to_numpy() for part in (y, y[::-1]))
    return (before + after[::-1]) / 2


def _thinned(y: Any) -> Any:
    """Where the smallest and the largest of neighbouring values are, so that spikes stay visible."""
    if len(y) <= POINTS:
        return np.arange(len(y))
    begins = np.linspace(0, len(y), POINTS // 2, endpoint=False).astype(int)
    parts = zip(begins, [*begins[1:], len(y)], strict=True)
    found = [begin + at for begin, end in parts for at in (y[begin:end].argmin(), y[begin:end].argmax())]
    return np.unique([0, *found, len(y) - 1])


def _scale(axes: Any, losses: list[pd.Series]) -> None:
    finite = np.concatenate([series[np.isfinite(series)] for series in losses])
    if len(finite) and finite.min() > 0 and finite.max() > 10**DECADES * finite.min():
        axes.set_yscale("log")
