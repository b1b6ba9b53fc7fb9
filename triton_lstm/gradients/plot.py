"""Recorded gradients as a figure."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from triton_lstm.gradients.layer import LayerGradients
from triton_lstm.gradients.statistics import GATES

SHOWN = 24  # layers at most; the title gives the total
DECADES = 12.0  # range of the color scale at most; smaller values are clipped
FEW = 60  # steps, up to which each one has a marker
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000")  # Okabe and Ito's, without the reds
STYLES = ("-", "--", ":", "-.")
ODD = dict(marker="x", linestyle="none", color="red")  # NaN or infinity


def plot(records: list[LayerGradients], path: str | os.PathLike[str] | None) -> Any:
    """See Gradients.plot."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('plot() needs matplotlib: pip install ".[perf]" in the checkout') from None
    if path is not None and not str(path).lower().endswith((".png", ".svg")):
        raise ValueError(f"the figure can be saved as .png or .svg, got {os.fspath(path)!r}")
    shown = records[:SHOWN]
    statistics = [record.statistics() for record in shown]
    names = _names(shown)
    hidden = [s["hidden"].norm.cpu().numpy() for s in statistics]
    gates = [s[gate].norm.cpu().numpy() for s in statistics for gate in GATES]
    gate_names = [f"{name} {gate}" for name in names for gate in GATES]
    heights = [3.2, 0.9 + 0.24 * len(names), 0.9 + 0.17 * len(gate_names)]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    lines, layers, by_gate = figure.subplots(3, 1, height_ratios=heights)
    _line_plot(lines, names, hidden)
    _heat_map(figure, layers, names, hidden, "|dL/dh[t]|")
    _heat_map(figure, by_gate, gate_names, gates, "|dL/d gate[t]|, pre-activation")
    some = f", {SHOWN} of {len(records)} layers" if len(records) > SHOWN else ""
    figure.suptitle(f"gradients through time{some}")
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def _names(records: list[LayerGradients]) -> list[str]:
    """A label per record: the layer, and the fields in which the records differ."""
    result = [""] * len(records)
    for field, form in [
        ("module", "{}"),
        ("call", "call {}"),
        ("backward", "pass {}"),
        ("layer", "layer {}"),
        ("direction", "{}"),
    ]:
        values = [getattr(record, field) for record in records]
        if field == "layer" or len(set(values)) > 1:
            result = [f"{name} {form.format(value)}".strip() for name, value in zip(result, values, strict=True)]
    return result


def _line_plot(axes: Any, names: list[str], norms: list[Any]) -> None:
    styles = [dict(linestyle=style, color=colour) for style in STYLES for colour in COLOURS]
    for name, norm, style in zip(names, norms, styles, strict=False):
        shown = np.where(np.isfinite(norm) & (norm > 0), norm, np.nan)
        marker = "o" if len(norm) <= FEW else ""
        axes.plot(np.arange(len(norm)), shown, label=name, lw=1.2, marker=marker, ms=3, **style)
        odd = np.flatnonzero(~np.isfinite(norm))
        axes.plot(odd, np.full(len(odd), 0.02), ms=5, transform=axes.get_xaxis_transform(), **ODD)
    if any((np.isfinite(norm) & (norm > 0)).any() for norm in norms):
        axes.set_yscale("log")
    axes.set(xlabel="step t", ylabel="|dL/dh[t]|", title="norm over time; red: NaN or infinity")
    axes.set_xlim(-0.5, max(map(len, norms)) - 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    beside = dict(fontsize=6, labelspacing=0.2, loc="upper left", bbox_to_anchor=(1, 1))
    axes.legend(**beside if len(names) > 8 else dict(fontsize=7))
    axes.grid(alpha=0.3)


def _heat_map(figure: Any, axes: Any, names: list[str], norms: list[Any], title: str) -> None:
    grid = np.full((len(norms), max(1, *map(len, norms))), np.nan)
    for row, norm in zip(grid, norms, strict=True):
        row[: len(norm)] = norm
    positive = np.isfinite(grid) & (grid > 0)
    logs = np.log10(grid, where=positive, out=np.full_like(grid, np.nan))
    high = float(logs[positive].max()) if positive.any() else 0.0
    low = max(float(logs[positive].min()), high - DECADES) if positive.any() else -1.0
    image = axes.imshow(
        np.ma.masked_invalid(logs), aspect="auto", interpolation="nearest", vmin=min(low, high - 0.1), vmax=high
    )
    axes.set_facecolor("lightgrey")
    for y, norm in enumerate(norms):
        x = np.flatnonzero(~np.isfinite(norm))
        axes.plot(x, np.full(len(x), y), ms=4, **ODD)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlim(-0.5, grid.shape[1] - 0.5)
    grey = "zero" if len(set(map(len, norms))) == 1 else "zero, or no such step"
    axes.set(xlabel="step t", title=f"{title}; grey: {grey}")
    smaller = "min" if positive.any() and logs[positive].min() < low else "neither"
    figure.colorbar(image, ax=axes, extend=smaller, label="log10(norm)").ax.yaxis.label.set_size(8)
