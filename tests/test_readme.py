"""README.md: its commands run in order, and its table of environment variables is complete."""

import os
import shlex
from pathlib import Path

import pytest

pytest.importorskip("pandas")
pytest.importorskip("pydantic")
import torch

from triton_lstm.cli import main as cli
from triton_lstm.perf import floor
from triton_lstm.settings import ENVIRONMENT, Variable

README = (Path(__file__).parent.parent / "README.md").read_text()
COMMANDS = [line for line in README.splitlines() if line.startswith("python -m triton_lstm ")]
SMALLER = {  # added to each, so that it takes seconds
    "train": ["--hidden", "8", "--embed", "4", "--batch", "4", "--seq-len", "5", "--sample", "5", "--steps", "2"],
    "train --resume": ["--steps", "3"],
    "gradients": ["--seq-len", "5"],
    "bench": ["--only", "case=fp32-T3-B2-I8-H8", "--only", "mode=inference", "--only", "provider=triton_lstm,nn.LSTM"],
}


def test_every_command_in_order(tmp_path, monkeypatch, capsys, own_text_cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))  # the commands set it
    monkeypatch.setattr(floor, "floor_names", lambda device: ["copy", "matmul-fp32"])
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("the quick brown fox jumps over the lazy dog. " * 40)
    assert {line.split()[3] for line in COMMANDS} == {
        "train", "runs", "gradients", "bench", "report", "diff", "tune", "doctor"
    }  # fmt: skip
    for line in COMMANDS:
        argv = shlex.split(line, comments=True)[3:]
        if torch.cuda.is_available() and argv[0] in ("bench", "tune") and "needs a GPU" in line:
            continue  # make gpu runs those
        smaller = SMALLER.get(" ".join(argv[:2])) or SMALLER.get(argv[0], [])
        expected = 2 if "needs a GPU" in line else 0
        status = cli.main([*argv, *(smaller if expected == 0 else [])])
        out, err = capsys.readouterr()
        assert status == expected and "Traceback" not in err, f"{line}: {out}{err}"
    assert Path("out.png").stat().st_size > 1000 and len(list(Path("runs").glob("*/metrics.csv"))) == 3


def test_the_environment_variables_are_those_of_settings():
    rows = [line.strip("| ").split(" | ") for line in README.splitlines() if line.startswith("| `TRITON_")]
    assert {name.strip("`"): Variable(*cells) for name, *cells in rows} == ENVIRONMENT
