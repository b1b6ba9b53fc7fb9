"""Plots of a frame of results, as PNG files."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from triton_lstm.perf.providers import OURS, PROVIDERS
from triton_lstm.perf.results import DEVICE, SHAPE
from triton_lstm.system.machine import NO_GPU
from triton_lstm.system.terminal import plain

MODE = "forward_backward"
PANELS = 12  # at most per figure; the title gives the total
MARKS = {"fp16": ("o", "-"), "bf16": ("s", "--"), "tf32": ("^", "-."), "fp32": ("D", ":")}  # markers, line styles


def _colour(provider: str) -> str:
    """The same in every figure; grey for an unknown provider, from another version."""
    names = list(PROVIDERS)
    return f"C{names.index(provider)}" if provider in names else "grey"


def _label(text: object) -> str:
    """Text for matplotlib: shortened, with dollar signs escaped."""
    return textwrap.shorten(plain(text), 60, placeholder="...").replace("$", r"\$")


def draw_all(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Writes every figure for which `frame` has data; returns the files."""
    measured = frame[(frame["status"] == "ok") & (frame["provider"] != DEVICE)]
    figures = {
        "us_per_step_over_h": _over(measured, "H", "us_per_step", "us per step"),
        "us_per_step_over_b": _over(measured, "B", "us_per_step", "us per step"),
        "speedup": None if NO_GPU in set(frame["gpu"]) else _heat_maps(measured),
        "memory_over_t": _over(measured, "T", "peak_mb", "MB above inputs and weights"),
        "roofline": _roofline(measured, frame[frame["provider"] == DEVICE]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)  # of an earlier run
        if figure is not None:
            gpus = _label(", ".join(sorted(set(frame["gpu"]))))
            figure.text(0, 1, gpus, fontsize=7, va="bottom", color="grey")  # outside the legend
            figure.savefig(path, dpi=110, bbox_inches="tight")
            written.append(path)
    return written


def _panels(count: int, width: float = 4.6, height: float = 3.4) -> tuple[Figure, list[Any]]:
    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def _groups(rows: pd.DataFrame, axis: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Groups of rows that differ in `axis` only (I follows H), the largest first."""
    square = rows[rows["I"] == rows["H"]] if axis == "H" else rows
    same = [name for name in SHAPE if name != axis and not (axis == "H" and name == "I")]
    groups = [group for _, group in square.groupby(same, dropna=False) if group[axis].nunique() > 1]
    for group in sorted(groups, key=lambda group: -group[axis].nunique()):
        first = group.iloc[0]
        fixed = [f"{name}={first[name]:g}" for name in ("T", "B", "H", "layers") if name in same]
        extra = [name for name in ("bidirectional", "batch_first", "packed") if first[name]]
        extra += [] if pd.isna(first["resets"]) else [f"resets={first['resets']:g}"]
        yield ", ".join([first["precision"], *fixed, *extra]), group


def _over(measured: pd.DataFrame, axis: str, value: str, label: str) -> Figure | None:
    rows = measured[(measured["mode"] == MODE) & measured[value].notna()]
    groups = list(_groups(rows, axis))
    if not groups:
        return None
    shown, groups = f"{min(PANELS, len(groups))} of {len(groups)} series", groups[:PANELS]
    figure, panels = _panels(len(groups))
    lines: dict[str, Line2D] = {}
    for panel, (title, group) in zip(panels, groups, strict=True):
        for provider, line in group.groupby("provider", sort=False):
            line = line.sort_values(axis)
            width = 2 if provider == OURS else 1
            (artist,) = panel.plot(line[axis], line[value], marker="o", lw=width, color=_colour(provider))
            lines.setdefault(_label(provider), artist)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
        ticks = sorted(group[axis].unique())
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7, rotation=60)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_title(_label(title), fontsize=9)
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"{MODE.replace('_', ' + ')}, {shown}")
    return figure


def _heat_maps(measured: pd.DataFrame) -> Figure | None:
    """Speedup over nn.LSTM, H x B, one panel per precision and T; red is slower."""
    plain = measured[~measured[["bidirectional", "batch_first", "packed"]].astype(bool).any(axis=1)]
    plain = plain[
        (plain["layers"] == 1) & (plain["proj_size"] == 0) & (plain["I"] == plain["H"]) & plain["resets"].isna()
    ]
    rows = plain[(plain["provider"] == OURS) & (plain["mode"] == MODE) & plain["speedup"].notna()]
    groups = sorted(rows.groupby(["precision", "T"]), key=lambda item: -len(item[1]))
    if not groups:
        return None
    figure, panels = _panels(len(groups), height=4)
    for panel, ((precision, steps), group) in zip(panels, groups, strict=True):
        grid = group.pivot_table(index="B", columns="H", values="speedup")
        image = panel.imshow(np.log2(grid), cmap="RdYlGn", vmin=-2, vmax=2, aspect="auto", origin="lower")
        panel.set_xticks(range(grid.shape[1]), [f"{h:g}" for h in grid.columns], fontsize=7)
        panel.set_yticks(range(grid.shape[0]), [f"{b:g}" for b in grid.index], fontsize=7)
        panel.set(xlabel="H", ylabel="B")
        for (y, x), speedup in np.ndenumerate(grid.to_numpy()):
            if np.isfinite(speedup):
                dark = abs(np.log2(speedup)) > 1.4
                text = f"{speedup:.3g}"
                panel.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        panel.set_title(_label(f"{precision}, T={steps:g}"), fontsize=9)
        bar = figure.colorbar(image, ax=panel, ticks=[-2, -1, 0, 1, 2], extend="both")
        bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"], fontsize=7)
        bar.set_label("times nn.LSTM's speed", fontsize=8)
    figure.suptitle(f"speedup over nn.LSTM, {MODE.replace('_', ' + ')}")
    return figure


def _roofline(measured: pd.DataFrame, floor: pd.DataFrame) -> Figure | None:
    """TFLOP/s over a case's operations per byte of minimal traffic, below the measured copy and matmul rates."""
    rows = measured[(measured["mode"] == MODE) & measured["tflops"].notna()]
    if rows.empty:
        return None
    figure, (panel,) = _panels(1, width=7, height=5)
    intensity = rows["flops"].astype(float) / rows["bytes"].astype(float)
    span = np.geomspace(intensity.min() / 2, intensity.max() * 2, 50)
    bandwidth = floor.loc[floor["case"] == "copy", "gbs"].dropna()
    for (precision, provider), group in rows.groupby(["precision", "provider"], sort=False):
        mark, _ = MARKS.get(precision, (".", "-"))
        panel.scatter(intensity[group.index], group["tflops"], s=18, marker=mark, color=_colour(provider))
    shown = [Line2D([], [], color=_colour(name), label=_label(name), lw=4) for name in rows["provider"].unique()]
    for precision in rows["precision"].unique():
        mark, dashes = MARKS.get(precision, (".", "-"))
        rate = floor.loc[floor["case"] == f"matmul-{precision}", "tflops"].dropna()
        label, line_style = _label(precision), "none"
        if len(rate) and len(bandwidth):
            roof = np.minimum(rate.iloc[0], span * bandwidth.iloc[0] / 1e3)
            panel.plot(span, roof, color="grey", lw=1, ls=dashes)
            label, line_style = f"{label}; matmul {rate.iloc[0]:.3g} TFLOP/s", dashes
        shown.append(Line2D([], [], color="grey", marker=mark, ls=line_style, label=label))
    panel.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
    panel.set_title(f"{MODE.replace('_', ' + ')}; grey: rates of a copy and a matmul", fontsize=9)
    figure.legend(handles=shown, fontsize=7, loc="outside right upper")
    return figure
