"""A tiny training run through the command line, for test_train.py and test_checkpoint.py."""

import os
from pathlib import Path

import pytest
import torch

from triton_lstm.cli import main as cli

# The kernels run on either device: compiled, or in the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"hidden": 8, "layers": 2, "embed": 4, "batch": 4, "seq-len": 5, "sample": 5}
TINY = [f"--{name}={value}" for name, value in {**SIZES, "device": DEVICE, "dtype": "float32"}.items()]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.fixture
def run(tmp_path, text, capsys, monkeypatch):
    """Runs `train` in this process; returns exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))  # the command sets it

    def call(*args, text=text):
        try:
            status = cli.main(["train", *TINY, *(["--text", str(text)] if text else []), *map(str, args)])
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


def saved(folder: Path) -> Path:
    """The checkpoint of the only run there."""
    (path,) = folder.glob("runs/*/train.pt")
    return path


def losses(path) -> list[float]:
    return torch.load(path, weights_only=True)["losses"]
