"""The command runs: what it lists, compares, plots, and what it says about anything else."""

import io
import math
import os
import subprocess
import sys
import threading

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")
pytest.importorskip("pydantic")
pytest.importorskip("yaml")
import pandas as pd
from run_folders import make_run, three_runs

from triton_lstm.cli import main as cli
from triton_lstm.system.installed import release
from triton_lstm.training.config import Config, Execution, Optimizer
from triton_lstm.training.logs.metrics import HEADER, Metrics


@pytest.fixture
def runs(capsys, tmp_path, monkeypatch):
    """Runs the command in a folder; returns exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*argv):
        try:
            status = cli.main(["runs", *map(str, argv)])
        except SystemExit as leave:
            status = leave.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return call


def cells(out):
    """The rows of a printed table, by the first cell, as words."""
    return {line.split()[0]: line.split()[1:] for line in out.splitlines()[2:]}


def test_a_table(runs, tmp_path):
    three_runs(tmp_path / "runs")
    status, out, err = runs()
    assert (status, err) == (0, "")
    header = "run steps time loss validation loss best validation best step bits per byte tokens per s hidden lr"
    assert out.splitlines()[0].split() == header.split()
    assert cells(out) == {
        "a": ["3/100", "0:00:06", "1", "1.5", "1.5", "2", "2.164", "502", "64", "0.5"],
        "b": ["2/100", "0:00:04", "2.5", "2.25", "2", "1", "3.246", "501.5", "128", "0.5"],
        "c": ["3/100", "0:00:06", "nan", "502", "128", "0.25"],
    }


def test_infinite_losses_are_visible(runs, tmp_path):
    make_run(tmp_path / "runs" / "a", (1.0, math.inf), (math.nan,))
    make_run(tmp_path / "runs" / "b", (1.0, -math.inf))
    _, out, _ = runs()
    assert cells(out)["a"][2:4] == ["inf", "nan"] and cells(out)["b"][2] == "-inf"
    assert "loss             inf" in runs("runs/a")[1] and "validation loss  nan" in runs("runs/a")[1]
    _, out, _ = runs("--csv")
    assert out.splitlines()[1].startswith("a,2,100,4.0,inf,nan,,,nan,")


def test_a_narrow_terminal_keeps_what_matters(runs, tmp_path, monkeypatch):
    three_runs(tmp_path / "runs")
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = runs()
    assert all(len(line) <= 60 for line in out.splitlines())
    assert "hidden" in out and "lr" in out and "2.25" in out
    assert "no room in 60 columns for" in out


def test_csv_is_complete_and_exact(runs, tmp_path):
    three_runs(tmp_path / "runs")
    make_run(tmp_path / "runs" / "d", (1 / 3,), config=Config(execution=Execution(dtype="fp32")))
    status, out, err = runs("--csv")
    table = pd.read_csv(io.StringIO(out), float_precision="round_trip").set_index("run")
    assert (status, err) == (0, "") and table.loc["d", "loss"] == 1 / 3
    assert list(table["dtype"]) == ["bf16"] * 3 + ["fp32"] and list(table["steps"]) == [3, 2, 3, 1]
    assert list(table["of"]) == [100, 100, 100, 1000]
    assert ",100," in out and ",2," in out and "100.0," not in out


@pytest.mark.parametrize(
    "column, order",
    [("loss", "abc"), ("Validation Loss", "abc"), ("lr", "cab"), ("time", "bac"), ("dtype", "abc"), ("run", "abc")],
)
def test_sort(runs, tmp_path, column, order):
    three_runs(tmp_path / "runs")
    if column == "dtype":  # texts, and one that is not known
        make_run(tmp_path / "runs" / "d", config=Config(execution=Execution(dtype="fp32")))
        (tmp_path / "runs" / "a" / "config.yaml").write_text("")
        order = "bcda"
    status, out, _ = runs("--sort", column)
    assert status == 0 and list(cells(out)) == list(order)


def test_last(runs, tmp_path):
    three_runs(tmp_path / "runs")
    assert list(cells(runs("--last", 2)[1])) == ["b", "c"]
    assert list(cells(runs("--last", 99)[1])) == ["a", "b", "c"]
    assert runs("--last", 1)[1].startswith("runs/c: 3/100 steps")


def test_one_run_in_detail(runs, tmp_path):
    config = Config(optimizer=Optimizer(steps=100, clip=None, betas=(0.5, 0.75)))
    make_run(tmp_path / "runs" / "a", (3.0, 2.0), (2.5,), config)
    for argv in ([], ["runs/a"], ["runs", "runs/a"]):
        status, out, err = runs(*argv)
        assert (status, err) == (0, "") and out.startswith("runs/a: 2/100 steps, 0:00:04\n")
    words = [line.split() for line in out.splitlines()]
    for row in (
        "clip off 1.0",
        "betas 0.5, 0.75 0.9, 0.95",
        "steps 100 1000",
        "gpu NVIDIA H100",
        "loss 2 2",
        "validation loss 2.5 1",
        "best validation 2.5 1",
        "tokens per s 502 2",
    ):
        assert row.split() in words
    (checkpoint,) = (line for line in words if line[:1] == ["step_00000002"])
    assert checkpoint[1] == "2.5"
    assert ["lr"] not in [line[:1] for line in words] and "hidden" not in out


def test_a_plot(runs, tmp_path):
    three_runs(tmp_path / "runs")
    for name in ("out.png", "out.svg", "out.pdf"):
        status, out, err = runs("--plot", name)
        assert status == 0 and err == f"figure: {name}\n" and len(cells(out)) == 3
        assert (tmp_path / name).stat().st_size > 5000
    svg = (tmp_path / "out.svg").read_text()
    assert "<!-- a: hidden=64, lr=0.5 -->" in svg and "<!-- loss over tokens -->" in svg
    assert sorted(os.listdir()) == ["out.pdf", "out.png", "out.svg", "runs"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["no"], "no does not exist. Train first, or give the folder of your runs."),
        ([], "runs does not exist. Train first, or give the folder of your runs."),
        (["there", "empty"], "empty contains no run of `train`. Train first, or give the folder of your runs."),
        (["file"], "file is not a folder. Give a run, or a folder of runs."),
        (["there", "--sort", "los"], "runs have no column 'los'. Did you mean 'loss'? Available: run, steps, of, "),
        (["there", "--sort", "\x1b[31m"], r"runs have no column '\x1b[31m'. Available: run"),
        (["there", "--last", "0"], "argument --last: must be an integer from 1 to 2147483648, got '0'. See"),
        (["there", "--plot", "out.gif"], "cannot save out.gif: the suffix must be .png, .svg or .pdf. Choose"),
        (["there", "--plot", "no/out.png"], "cannot save no/out.png: its folder does not exist or is not writable."),
        (["there", "--plot", "folder.png"], "cannot save folder.png: it is not a regular file."),
        (["there/new", "--plot", "out.png"], "there is nothing to plot: none of the runs has logged a loss yet."),
    ],
)
def test_bad_input(runs, tmp_path, argv, message):
    three_runs(tmp_path / "there")
    make_run(tmp_path / "there" / "new", ())
    for name in ("empty/smoke", "folder.png"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    status, _, err = runs(*argv)
    assert status == 2 and err.count("\n") == 1 and err.startswith(f"triton-lstm runs: {message}")
    assert err.endswith(".\n") and "\x1b" not in err and not (tmp_path / "out.png").exists()


def test_damaged_and_foreign_folders(runs, tmp_path):
    """Each is listed with what is wrong, next to one that is not; and shown alone."""
    folder = tmp_path / "runs"
    names = ["binary", "cut", "empty", "foreign", "no-config", "no-metrics", "whole", "yaml"]
    for name in names:
        make_run(folder / name)
    (folder / "binary" / "metrics.csv").write_bytes(os.urandom(5000))
    (folder / "cut" / "metrics.csv").write_bytes(HEADER + b"1,,,5.0,,,,,,\n2,,,6.")
    (folder / "empty" / "metrics.csv").write_bytes(HEADER)
    (folder / "foreign" / "metrics.csv").write_text("a,b\n1,2\n")
    (folder / "no-config" / "config.yaml").unlink()
    (folder / "no-metrics" / "metrics.csv").unlink()
    (folder / "yaml" / "config.yaml").write_text("a: [\x1b[31m")
    (folder / "yaml" / "about.yaml").write_text('gpu: "\\e[31mred"\n? [a, b]\n: c')
    (folder / "other" / "deep").mkdir(parents=True)
    status, out, err = runs("--plot", "out.png")
    assert status == 0 and err == "no runs, left out: runs/other\nfigure: out.png\n"
    found = cells(out)
    assert list(found) == names and "\x1b" not in out
    assert " ".join(found["binary"]).endswith("metrics.csv is damaged")
    assert found["cut"] == ["1/100", "5"]
    assert " ".join(found["empty"]) == "0/100 no metrics yet"
    assert " ".join(found["foreign"]) == "0/100 metrics.csv is damaged"
    assert " ".join(found["no-config"]).startswith("3 0:00:06 1 ") and found["no-config"][-2:] == ["no", "config.yaml"]
    assert " ".join(found["no-metrics"]) == "0/100 no metrics yet"
    assert " ".join(found["yaml"]).endswith("config.yaml is damaged; about.yaml is damaged")
    for name in names:
        status, out, err = runs(f"runs/{name}")
        assert status == 0 and out.startswith(f"runs/{name}: ") and "\x1b" not in out + err
        assert runs(f"runs/{name}", "--csv")[1].count("\n") == 2


@pytest.mark.parametrize("strings", [False, True], ids=["objects", "strings"])  # as in pandas 2, as in pandas 3
def test_control_characters_are_not_obeyed(runs, tmp_path, strings):
    if strings and release(pd.__version__) < (2, 3):
        pytest.importorskip("pyarrow", reason="strings of pandas 2.2 and older need pyarrow")
    for name in ("\x1b[31mred", "plain"):
        folder = make_run(tmp_path / "runs" / name)
        (folder / "config.yaml").write_text('text: ["\\e[32mgreen\\n"]' if name == "plain" else "text: [a]")
    (tmp_path / "runs" / "\x1b[33myellow").mkdir()
    for argv in ([], ["--csv"], ["--plot", "out.svg"], ["--last", "1"], ["--sort", "text"]):
        with pd.option_context("future.infer_string", strings):
            status, out, err = runs(*argv)
        assert status == 0 and "\x1b" not in out + err
    assert "\x1b" not in (tmp_path / "out.svg").read_text()


def test_a_run_that_is_being_written(runs, tmp_path):
    folder = make_run(tmp_path / "runs" / "a", ())
    make_run(tmp_path / "runs" / "b")
    begun, stop = threading.Event(), threading.Event()

    def write():
        with Metrics(folder, Config()) as metrics:
            for step in range(1, 10**9):
                metrics.log(step, tokens=step, loss=1 / step)
                begun.set()
                if stop.is_set():
                    return

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert begun.wait(60)
        done = [int(cells(runs()[1])["a"][0].split("/")[0]) for _ in range(10)]
    finally:
        stop.set()
        thread.join()
    assert done == sorted(done) and done[-1] > 0
    assert "damaged" not in runs()[1]


def test_without_a_display_and_without_pyplot(tmp_path):
    """As on a server; pyplot would look for a display."""
    three_runs(tmp_path / "runs")
    code = (
        "import argparse, sys\n"
        "from triton_lstm.cli.runs import add_commands\n"
        "parser = argparse.ArgumentParser(); add_commands(parser.add_subparsers())\n"
        "args = parser.parse_args(['runs', '--plot', 'out.png'])\n"
        "assert args.run(args) == 0 and 'matplotlib.pyplot' not in sys.modules\n"
    )
    variables = {name: value for name, value in os.environ.items() if name != "DISPLAY"} | {"MPLBACKEND": "TkAgg"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").exists()
