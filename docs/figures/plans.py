"""docs/explanation/plan.md and cost_model.md: real plans, and what the cost model predicts beside what was measured."""

from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from style import BLACK, BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, RED, SKY, WHITE, WIDTH, box, canvas, label

from triton_lstm.perf.step.loops import TimeLoop, read_measured
from triton_lstm.planning.cost import Cost, cost
from triton_lstm.planning.devices import known_gpu
from triton_lstm.planning.limits import why_not
from triton_lstm.planning.plan import Plan
from triton_lstm.planning.problem import Problem
from triton_lstm.tuning.choice import choose

GPU = known_gpu("H200")
TERMS = {"exchange": BLUE, "rows": SKY, "parts": PURPLE, "weights": RED, "product": GREEN, "cell": ORANGE}


def plan_partition() -> Figure:
    """Two layers' states, divided as a call on an H200 does it; and one program's weights."""
    figure, axes = canvas(4.55, 8.9, 4.86)
    for top, H, B in ((4.0, 768, 16), (2.65, 1024, 64)):
        problem = Problem(GPU, "bf16", B, H, backward=False)
        plan = choose(problem).plan
        _state(axes, top, problem, plan)
    first = Problem(GPU, "bf16", 16, 768, backward=False)
    _weights(axes, first, choose(first).plan)
    return figure


def _state(axes: Any, top: float, problem: Problem, plan: Plan) -> None:
    """h[t], (B, H): a program for each rectangle."""
    programs, groups = plan.grid(problem.H)
    left, width, height = 1.35, 7.3, 0.28
    title = f"H={problem.H}, B={problem.B}: {plan}"
    label(axes, left, top + 0.58, title, ha="left", weight="bold")
    label(axes, left + width, top + 0.58, f"{programs} x {groups} programs", ha="right")
    for group in range(groups):
        y = top - (group + 1) * height + 0.1
        rows = f"rows {group * plan.block_b} to {(group + 1) * plan.block_b - 1}"
        label(axes, left - 0.08, y + height / 2, rows, ha="right", size=8)
        for k in range(programs):
            color = BLUE if k == group == 0 else PALE
            x = left + k * width / programs
            box(axes, x, y, width / programs, height, facecolor=color, edgecolor=GREY, lw=0.6, rounding=0)
    label(axes, left, top + 0.26, f"units 0 to {plan.block_h - 1}", ha="left", size=8, color=BLUE)
    label(axes, left + width, top + 0.26, f"unit {problem.H - 1}", ha="right", size=8)


def _weights(axes: Any, problem: Problem, plan: Plan) -> None:
    """A program's part of W_hh: chunks of the sum, and in each a slice for every warp."""
    left, width, y, height = 1.35, 7.3, 0.45, 0.55
    terms, columns = plan.sum_length(problem), plan.block_h * problem.columns_per_unit
    title = f"W_hh of one program of the upper plan: {columns} columns (4 gates of {plan.block_h} units), {terms} terms"
    label(axes, left, y + height + 0.46, title, ha="left", weight="bold", size=8.5)
    chunks = terms // plan.block_k
    for chunk in range(chunks):
        x = left + chunk * width / chunks
        for s in range(plan.slices):
            place = x + s * width / chunks / plan.slices, y
            size = width / chunks / plan.slices, height
            box(axes, *place, *size, facecolor=BLUE if s == 0 else SKY, edgecolor=WHITE, lw=0.6, rounding=0)
        box(axes, x, y, width / chunks, height, facecolor="none", edgecolor=BLACK, lw=1.2, rounding=0)
        text = f"terms {chunk * plan.block_k} to {(chunk + 1) * plan.block_k - 1}"
        label(axes, x + width / chunks / 2, y + height + 0.18, text, size=8)
    note = f"{chunks} chunks of {plan.block_k}, each in {plan.slices} slices, one for each warp; dark: the first warp's"
    label(axes, left, y - 0.22, note, ha="left", size=8.5)


def cost_terms() -> Figure:
    """The best measured config of each shape: what is predicted, by term, relative to what was measured."""
    loops = [loop for loop in read_measured() if loop.problem.precision == "bf16"]
    loops.sort(key=lambda loop: (loop.problem.backward, loop.problem.H, loop.problem.B, loop.us))
    best = [next(group) for _, group in groupby(loops, key=lambda loop: loop.problem)]
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    for axes, backward in zip(panels, (False, True), strict=True):
        _bars(axes, [loop for loop in best if loop.problem.backward == backward])
        axes.set(title="backward" if backward else "forward", xlabel="share of the measured time")
    handles, names = panels[1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def _bars(axes: Any, loops: list[TimeLoop]) -> None:
    places = np.arange(len(loops))[::-1]
    at = np.zeros(len(loops))
    parts = [_by_term(cost(loop.problem, loop.plan)) for loop in loops]
    for name, color in TERMS.items():
        widths = np.array([part[name] / loop.us for part, loop in zip(parts, loops, strict=True)])
        axes.barh(places, widths, left=at, height=0.66, color=color, label=name)
        at += widths
    axes.axvline(1, color=BLACK, lw=1.5, label="measured")
    names = [f"H={loop.problem.H}, B={loop.problem.B}\n{loop.us:.1f} us measured" for loop in loops]
    axes.set_yticks(places, names, fontsize=7.5)
    axes.set_ylim(-0.6, len(loops) - 0.4)
    axes.set_axisbelow(True)


def _by_term(found: Cost) -> dict[str, float]:
    """us of each term in a step of the whole batch; their sum is what is predicted."""
    read = {name: found.rounds * found.sharing * getattr(found, name) for name in ("rows", "parts", "weights")}
    worked = {name: found.rounds * getattr(found, name) for name in ("exchange", "product", "cell")}
    rest = found.us - sum(read.values())
    return read | {name: us * rest / sum(worked.values()) for name, us in worked.items()}


def cost_scatter() -> Figure:
    """All measured configs that may be planned."""
    loops = [loop for loop in read_measured() if why_not(loop.problem, loop.plan) is None]
    measured = np.array([loop.us for loop in loops])
    predicted = np.array([cost(loop.problem, loop.plan).us for loop in loops])
    error = np.sqrt(np.mean(np.log(predicted / measured) ** 2))
    figure = Figure(figsize=(WIDTH * 0.72, WIDTH * 0.66), layout="constrained")
    axes = figure.subplots()
    for backward, color, marker in ((False, BLUE, "o"), (True, ORANGE, "^")):
        some = [k for k, loop in enumerate(loops) if loop.problem.backward == backward]
        name = f"{'backward' if backward else 'forward'}, {len(some)} configs"
        axes.plot(measured[some], predicted[some], marker, color=color, ms=4, mew=0.3, mec=WHITE, label=name)
    ends = np.array([min(measured.min(), predicted.min()) * 0.9, max(measured.max(), predicted.max()) * 1.1])
    axes.plot(ends, ends, color=BLACK, lw=1, label="equal")
    axes.fill_between(ends, ends / np.exp(error), ends * np.exp(error), color=GREY, alpha=0.2, lw=0,
                      label=f"RMS error, {error:.2f} of the logarithm")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal", xlabel="measured on an H200, us a step",
             ylabel="predicted by the cost model, us a step")  # fmt: skip
    ticks = [1, 2, 5, 10, 20]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
        axis.set_ticks([], minor=True)
    axes.legend(loc="upper left", frameon=False)
    axes.grid(alpha=0.3)
    return figure
