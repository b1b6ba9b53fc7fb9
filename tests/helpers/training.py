"""Tiny training runs through the command line, for the tests of `train`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from triton_lstm.cli import main as cli

# The kernels run on either device: compiled, or in the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"hidden": 8, "layers": 2, "embed": 4, "batch": 4, "seq-len": 5, "sample": 5, "log-every": 1}
TINY = [f"--{name}={value}" for name, value in {**SIZES, "device": DEVICE, "dtype": "fp32", "separator": "\n"}.items()]
TINY += ["--cache", "cache"]
LINE = b"the quick brown fox jumps over the lazy dog.\n"


@pytest.fixture
def text(tmp_path):
    """Forty documents: lines of one file."""
    path = tmp_path / "text.txt"
    path.write_bytes(LINE * 20 + b"jackdaws love my big sphinx of quartz\n" * 20)
    return path


@pytest.fixture
def own_text_cache(tmp_path, monkeypatch):
    """Token files in a folder of the test, not in the user's."""
    pytest.importorskip("cyclopts", reason="the options of `train` need cyclopts")
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *args, **kwargs: str(tmp_path / "cache"))


@pytest.fixture
def run(tmp_path, text, capsys, monkeypatch):
    """Runs `train` in this process, with TINY sizes unless a run is resumed; returns exit status, standard output and
    standard error."""
    pytest.importorskip("cyclopts", reason="the options of `train` need cyclopts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))  # the command sets it

    def call(*args, text=text):
        try:
            sizes = [] if "--resume" in args else TINY
            status = cli.main(["train", *sizes, *(["--text", str(text)] if text else []), *map(str, args)])
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def quick(monkeypatch):
    """Without a GPU PyTorch's own LSTM, for tests of what is around the kernels. On one the kernels, which are as quick
    and, unlike cuDNN, give the same bits every time."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_LSTM_BACKEND", "torch")


@pytest.fixture
def train_process(tmp_path, text):
    """Starts `train` in another process."""
    started = []

    def start(*args, before=(), alone=False, **environment):
        sizes = [] if "--resume" in args else [*TINY, "--text", str(text)]
        command = [sys.executable, "-m", "triton_lstm", "train", *sizes, *map(str, args)]
        alike = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | environment  # last bits depend on it
        pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        # `alone`: in a process group of its own
        started.append(subprocess.Popen([*before, *command], cwd=tmp_path, env=alike, start_new_session=alone, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def runs(folder: Path) -> list[Path]:
    """The folders of all runs there, oldest first."""
    return sorted((folder / "runs").iterdir(), key=lambda path: (path.stat().st_mtime_ns, path))


def saved(folder: Path) -> Path:
    """The last checkpoint of the only run there."""
    (run,) = runs(folder)
    return last(run)


def last(run: Path) -> Path:
    """The last checkpoint of a run."""
    return max(run.glob("checkpoints/step_*.pt"))


def rows(run: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv, as texts; without what depends on the clock."""
    import csv

    with (run / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in csv.DictReader(file)]


def losses(run: Path) -> list[float]:
    """The training losses in a run's metrics.csv."""
    return [float(row["loss"]) for row in rows(run) if row["loss"]]


def assert_same(a: Path, b: Path) -> None:
    """Two checkpoints of the same state, whatever time it took and how often it was saved."""
    left, right = (torch.load(path, weights_only=True) for path in (a, b))
    for content in (left, right):
        for name in ("config", "digest"):
            assert content.pop(name)
        assert content["progress"].pop("seconds")
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
