"""The figure of runs' losses: what is drawn, and what it says."""

import math

import numpy as np
import pytest

pytest.importorskip("pydantic", reason="the configuration needs pydantic")

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")
pytest.importorskip("yaml")
import pandas as pd
from run_folders import make_run, three_runs

from triton_lstm.settings import UsageError
from triton_lstm.training.logs import curves
from triton_lstm.training.logs.curves import draw, save
from triton_lstm.training.logs.runs import Run, read_run


def made(name, losses, tokens=None, config=None):
    steps = np.arange(1, len(losses) + 1)
    logged = {"loss": pd.Series(np.asarray(losses, dtype=float), steps)}
    if tokens is not None:
        logged["tokens"] = pd.Series(np.asarray(tokens, dtype=float), steps)
    return Run(name, config or {}, {}, logged, None)


def drawn(axes):
    """The lines with points, without the crosses."""
    return [line for line in axes.lines if len(line.get_xdata()) and line.get_marker() != "x"]


def crosses(axes):
    return [x for line in axes.lines if line.get_marker() == "x" for x in line.get_xdata()]


def test_what_is_drawn(tmp_path):
    three_runs(tmp_path)
    figure = draw([read_run(tmp_path / name) for name in "abc"])
    steps, tokens, validation, validation_tokens = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == ["steps", "tokens"] * 2
    assert steps.get_ylabel() == "loss (nats per token)"
    assert validation.get_ylabel() == "validation loss (nats per token)"
    assert [len(drawn(axes)) for axes in figure.axes] == [6, 6, 2, 2]  # a pale and a smoothed line of each loss
    pale, smooth = drawn(steps)[:2]
    assert pale.get_alpha() < 0.5 and smooth.get_alpha() is None and pale.get_color() == smooth.get_color()
    assert list(pale.get_xdata()) == [1, 2, 3] and list(pale.get_ydata()) == [3, 2, 1]
    assert list(drawn(tokens)[0].get_xdata()) == [1000, 2000, 3000]
    assert list(drawn(validation)[1].get_ydata()) == [2.0, 2.25]
    assert list(drawn(validation_tokens)[1].get_xdata()) == [1000, 2000]
    assert crosses(steps) == [2, 3] and crosses(tokens) == [2000, 3000] and crosses(validation) == []
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "a: hidden=64, lr=0.5",
        "b: hidden=128, lr=0.5",
        "c: hidden=128, lr=0.25",
        "NaN or infinity",
    ]
    colours = [line.get_color() for line in legend.get_lines()][:3]
    assert colours == [line.get_color() for line in drawn(steps)[::2]] and len(set(colours)) == 3


def test_without_validation_there_are_two_panels(tmp_path):
    figure = draw([read_run(make_run(tmp_path / "a"))])
    assert len(figure.axes) == 2 and [text.get_text() for text in figure.legends[0].get_texts()] == ["a"]


def test_runs_without_a_loss(tmp_path):
    runs = [read_run(make_run(tmp_path / "a", ())), read_run(make_run(tmp_path / "b"))]
    assert len(draw(runs).legends[0].get_texts()) == 1
    with pytest.raises(UsageError, match="nothing to plot"):
        draw(runs[:1])


def test_long_curves_are_thinned_but_keep_their_spikes():
    losses = np.linspace(3, 2, 1_000_000)
    losses[123_456], losses[654_321] = 99.0, 0.5
    losses[777_000:999_000] = math.nan
    steps, tokens = draw([made("a", losses, np.arange(1_000_000))]).axes
    pale, smooth = drawn(steps)
    assert len(pale.get_xdata()) <= curves.POINTS + 2 and len(smooth.get_xdata()) <= curves.POINTS + 2
    assert max(pale.get_ydata()) == 99 and min(pale.get_ydata()) == 0.5
    assert (pale.get_xdata()[0], pale.get_xdata()[-1]) == (1, 1_000_000)
    assert pale.get_xdata()[np.argmax(pale.get_ydata())] == 123_457
    assert 100 < len(crosses(steps)) <= curves.POINTS and crosses(steps)[0] == 777_001
    assert len(drawn(tokens)) == 2


def test_smoothing_neither_lags_nor_remembers_a_spike():
    line = np.linspace(5, 1, 3000)
    smooth = curves._smoothed(line)
    assert np.abs(smooth - line)[200:-200].max() < 0.01
    noisy = line + np.random.default_rng(0).normal(size=3000)
    assert np.abs(curves._smoothed(noisy) - line)[200:-200].max() < 0.7
    line[100] = 1e6
    assert np.abs(curves._smoothed(line) - np.linspace(5, 1, 3000))[-200:].max() < 0.1


@pytest.mark.parametrize(
    "losses, scale", [([3, 2, 1], "linear"), ([3000, 2, 1], "log"), ([3000, -2, 1], "linear"), ([math.nan], "linear")]
)
def test_scale(losses, scale):
    assert {axes.get_yscale() for axes in draw([made("a", losses)]).axes} == {scale}


def test_tokens_that_were_not_logged():
    steps, tokens = draw([made("a", [3, 2, 1])]).axes
    assert list(drawn(steps)[0].get_xdata()) == [1, 2, 3]
    assert all(np.isnan(line.get_xdata()).all() for line in drawn(tokens))


def test_many_runs():
    runs = [made(str(k), [2, 1]) for k in range(curves.SHOWN + 5)]
    figure = draw(runs)
    assert figure.get_suptitle() == f"{curves.SHOWN} of {len(runs)} runs"
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.legends[0].get_lines()}
    assert len(styles) == curves.SHOWN


@pytest.mark.parametrize("suffix, begin", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_names_are_no_formulas(tmp_path, suffix, begin):
    """Nor are they left out, or obeyed."""
    names = ["_a", r"$\frac{$", "b\x1b[31m", "$x$"]
    runs = [made(name, [2, 1], config={"x": "y" * 200 * (name == "$x$")}) for name in names]
    figure = draw(runs)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[0].strip().startswith("_a") and texts[1].startswith(r"\$\frac{\$") and r"\x1b" in texts[2]
    assert len(texts[3]) < 130
    path = tmp_path / f"out{suffix}"
    save(figure, path)
    assert path.read_bytes().startswith(begin) and list(tmp_path.iterdir()) == [path]
