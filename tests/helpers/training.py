"""Tiny training runs through the command line, for the tests of `train`."""

import contextlib
import json
import os
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from triton_lstm.cli import main as cli

with contextlib.suppress(ImportError):
    from triton_lstm.training.run_folder import RunFolder

with contextlib.suppress(ImportError):
    import safetensors.torch

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
    pytest.importorskip("safetensors", reason="checkpoints need safetensors")
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
    return RunFolder(run).steps()[-1]


def read(checkpoint: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A checkpoint's state.json, and its tensors in one piece."""
    reader = HuggingFaceStorageReader(str(checkpoint))
    stored = reader.read_metadata().state_dict_metadata.items()
    tensors = {name: torch.empty(found.size, dtype=found.properties.dtype) for name, found in stored}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return json.loads((checkpoint / "state.json").read_text()), tensors


def content(checkpoint: Path) -> dict[str, bytes]:
    """Its files."""
    return {file.name: file.read_bytes() for file in checkpoint.iterdir()}


def write(checkpoint: Path, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Exchanges the content of a checkpoint for this one; the checksums are right."""
    for file in checkpoint.glob("*.safetensors"):
        file.unlink()
    safetensors.torch.save_file(tensors, checkpoint / "all.safetensors")
    state["files"] = {"all.safetensors": zlib.crc32((checkpoint / "all.safetensors").read_bytes())}
    (checkpoint / "state.json").write_text(json.dumps(state))


def rows(run: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv, as texts; without what depends on the clock."""
    import csv

    with (run / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in csv.DictReader(file)]


def losses(run: Path) -> list[float]:
    """The training losses in a run's metrics.csv."""
    return [float(row["loss"]) for row in rows(run) if row["loss"]]


def assert_same(a: Path, b: Path) -> None:
    """Two checkpoints of the same state, whatever time it took, how often and by how many processes it was saved."""
    (state_a, tensors_a), (state_b, tensors_b) = read(a), read(b)
    for state in (state_a, state_b):
        for name in ("config", "digest", "files"):
            assert state.pop(name)
        assert state["progress"].pop("seconds")
    torch.testing.assert_close(state_a, state_b, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(tensors_a, tensors_b, rtol=0, atol=0, equal_nan=True)
