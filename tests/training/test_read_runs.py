"""Reading the folders of runs: what is in them, and anything else that may be there."""

import math
import os

import hypothesis.strategies as st
import pytest

pytest.importorskip("pydantic", reason="the configuration needs pydantic")

pytest.importorskip("pandas")
pytest.importorskip("yaml")
import pandas as pd
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from run_folders import make_run, three_runs

from triton_lstm.settings import UsageError
from triton_lstm.training.config import Config, Data, Optimizer
from triton_lstm.training.logs.logged import read_logged
from triton_lstm.training.logs.metrics import HEADER
from triton_lstm.training.logs.runs import differing, find_runs, frame, read_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


def test_a_run(tmp_path):
    run = read_run(make_run(tmp_path / "a", (3.0, 1 / 3), (math.nan,)))
    assert run.problem is None and run.name == "a" and run.about == {"torch": "2.9.1", "gpu": "NVIDIA H100"}
    assert run.config["steps"] == 100
    assert run.logged["loss"].to_dict() == {1: 3.0, 2: 1 / 3}
    assert list(run.logged["validation_loss"].index) == [1] and math.isnan(run.logged["validation_loss"][1])
    assert len(run.logged["lr"]) == 0
    assert run.metrics.loc[2, "tokens"] == 2000 and math.isnan(run.metrics.loc[2, "validation_loss"])


def test_rows_of_one_step_are_merged(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(HEADER + b"1,,,5.0,,,,,,\n2,,,4.0,,,,,,\n2,,,,,,,,3.5,\n2,,,4.5,,,,,,\n1,,,,,,,,9,\n")
    logged, problem = read_logged(path)
    assert problem is None and logged["loss"].to_dict() == {1: 5.0, 2: 4.5}
    assert logged["validation_loss"].to_dict() == {1: 9.0, 2: 3.5} and logged["validation_loss"].index[0] == 1


@pytest.mark.parametrize(
    "content, losses, problem",
    [
        (HEADER, {}, "no metrics yet"),
        (b"", {}, "no metrics yet"),
        (HEADER + b"1,,,5.0,,,,,,\n2,,,4", {1: 5.0}, None),
        (b"step,loss\n1,2\n", {1: 2.0}, None),
        (b"step\r\n1\r\n", {}, None),
        (b"loss\n1\n", {}, "metrics.csv is damaged"),
        (b"\x80\x04\n\0\n", {}, "metrics.csv is damaged"),
        (HEADER + b"1,,,5,,,,,,\nx,,,6,,,,,,\n3,,,y,,,,,,\n4,,,7,,,,,,\n", {1: 5.0, 4: 7.0}, "2 damaged rows"),
        (HEADER + b"1,,,5,,,,,,\n-1,,,6,,,,,,\n1.5,,,6,,,,,,\n1e300,,,6,,,,,,\n", {1: 5.0}, "3 damaged rows"),
        (HEADER + b"1,,,5,,,,,,\n2,,,6,,,,,,,,,,\n\xff\xff\n4,,,7,,,,,,\n", {1: 5.0, 2: 6.0, 4: 7.0}, "1 damaged row "),
        (HEADER + b'"1,,,5,,,,,,\n2,,,6,,,,,,\n', {2: 6.0}, "1 damaged row "),
        (HEADER + b"1,,,inf,,,,,,\n2,,,-inf,,,,,,\n", {1: math.inf, 2: -math.inf}, None),
    ],
)
def test_metrics_of_any_content(tmp_path, content, losses, problem):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    logged, found = read_logged(path)
    assert (found is None) if problem is None else problem in found
    assert logged.get("loss", pd.Series(dtype=float)).to_dict() == losses


@hypothesis_settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text("0123456789,\n\r-.einfa\"' \0é", max_size=60), st.booleans())
def test_metrics_of_random_content(folder, text, with_header):
    path = folder / "metrics.csv"
    path.write_bytes(HEADER * with_header + text.encode())
    logged, problem = read_logged(path)
    assert problem is None or (isinstance(problem, str) and "\n" not in problem)
    for series in logged.values():
        assert series.dtype == float and series.index.is_monotonic_increasing and series.index.is_unique


DEEP = "[" * 5000
BOMB = "\n".join(["b0: &b0 [x, x]", *(f"b{k}: &b{k} [*b{k - 1}, *b{k - 1}]" for k in range(1, 60))])  # 2**60 items


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", "config.yaml is empty"),
        (b"\x80\x04\0", "config.yaml is damaged"),
        (b"a: [", "config.yaml is damaged"),
        (b"just text", "config.yaml is damaged"),
        (b"!!python/object/apply:os.system [false]", "config.yaml is damaged"),
        (DEEP.encode(), "config.yaml is damaged"),
        (b"hidden: 2026-99-99", "config.yaml is damaged"),
        (b"model: 3", None),
        (b"x: " + b"y" * 2_000_000, "config.yaml is too large"),
        (b"hidden: " + b"9" * 5000, "config.yaml is damaged"),
        (b"model: {hidden: {a: {b: c}}, [1]: 2}", "config.yaml is damaged"),
        (b"model: {hidden: [[1, 2], {a: b}], none: ~}", None),
        (b"steps: many", None),
        (b"steps: 1.0e+400\nlr: .nan", None),
        (BOMB.encode(), None),
        (f"model: {{{', '.join(BOMB.splitlines())}}}".encode(), None),
    ],
)
def test_configurations_of_any_content(tmp_path, content, problem):
    """Next to a whole one, so that they are also compared."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_bytes(content)
    run, whole = read_run(tmp_path / "a"), read_run(make_run(tmp_path / "b"))
    assert run.problem == (f"{problem}; no metrics yet" if problem else "no metrics yet")
    table = frame([run, whole])
    assert list(table["run"]) == ["a", "b"] and list(table["steps"]) == [0, 3]


@pytest.mark.parametrize("name", ["config.yaml", "about.yaml", "metrics.csv"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_no_regular_files(tmp_path, name, make):
    """None of which may be waited for."""
    folder = make_run(tmp_path / "a")
    (folder / name).unlink()
    make(folder / name)
    assert ("no metrics" if name == "metrics.csv" else f"no {name}") in read_run(folder).problem


def test_what_a_frame_says(tmp_path):
    runs = [read_run(path) for path in find_runs([three_runs(tmp_path)])[0]]
    table = frame(runs).set_index("run")
    assert list(table.columns)[-3:] == ["hidden", "lr", "note"]
    a, b, c = (table.loc[name] for name in "abc")
    assert (a.steps, a.of, a.seconds, a.loss, a.tokens_per_s) == (3, 100, 6.0, 1.0, 502.0)
    assert (a.validation_loss, a.best_validation, a.best_step) == (1.5, 1.5, 2)
    assert (b.validation_loss, b.best_validation, b.best_step) == (2.25, 2.0, 1)
    assert b.bits_per_byte == 2.25 / math.log(2)
    assert math.isnan(c.loss) and math.isnan(c.validation_loss) and math.isnan(c.best_step)
    assert list(table["hidden"]) == [64, 128, 128] and table["hidden"].dtype == "int64"
    assert list(table["lr"]) == [0.5, 0.5, 0.25] and not table["note"].any()


def test_only_values_that_differ_are_columns(tmp_path):
    base = Config(optimizer=Optimizer(steps=100))
    other = Config(optimizer=Optimizer(steps=200, clip=None), data=Data(text=("x", "y"), tokenizer="t"))
    runs = [read_run(make_run(tmp_path / str(k), config=config)) for k, config in enumerate((base, base, other))]
    assert differing(runs[:2]) == {}
    assert differing(runs) == {
        "text": [[], [], ["x", "y"]],
        "tokenizer": [None, None, "t"],
        "clip": [1.0, 1.0, "off"],
    }
    table = frame(runs)
    assert list(table["text"]) == ["none", "none", "x, y"] and list(table["clip"]) == ["1.0", "1.0", "off"]
    assert list(table["of"]) == [100, 100, 200]


def test_a_run_without_a_configuration_differs_in_nothing(tmp_path):
    three_runs(tmp_path)
    (tmp_path / "b" / "config.yaml").unlink()
    table = frame([read_run(tmp_path / name) for name in "abc"]).set_index("run")
    assert table.loc["b", "note"] == "no config.yaml" and table.loc["b", "loss"] == 2.5
    assert table["hidden"].isna().tolist() == [False, True, False]
    assert differing([read_run(tmp_path / name) for name in "bc"]) == {}


def test_names_that_collide_with_other_columns(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"loss: {name}\nother: {name}")
    assert list(differing([read_run(tmp_path / name) for name in "ab"])) == ["config.loss", "other"]


def test_runs_with_the_same_name(tmp_path):
    paths = [make_run(tmp_path / parent / "a") for parent in ("x", "y")]
    found, _ = find_runs([tmp_path / "x", tmp_path / "y", paths[0], tmp_path / "x" / ".." / "x" / "a"])
    assert len(found) == 2
    assert [os.path.realpath(name) for name in frame(list(map(read_run, found)))["run"]] == list(map(str, paths))


def test_find_runs(tmp_path, monkeypatch):
    for name in ("2", "10", ".hidden", "2026-11-27"):
        make_run(tmp_path / "runs" / name)
    (tmp_path / "runs" / "smoke").mkdir()
    (tmp_path / "runs" / "file.csv").touch()
    found, others = find_runs([tmp_path / "runs"])
    assert [path.name for path in found] == ["10", "2", "2026-11-27"] and [path.name for path in others] == ["smoke"]
    monkeypatch.chdir(tmp_path / "runs" / "2")
    (found,), _ = find_runs(["."])
    assert read_run(found).name == "2"


@pytest.mark.parametrize("name, message", [("no", "does not exist"), ("file", "not a folder"), ("empty", "no run")])
def test_no_runs(tmp_path, name, message):
    (tmp_path / "file").touch()
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    with pytest.raises(UsageError, match=message):
        find_runs([tmp_path / name])
