"""The command train."""

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from training import DEVICE, losses, saved

import triton_lstm
from triton_lstm.cli import train as commands
from triton_lstm.training import data, trainer
from triton_lstm.training.config import SMALL
from triton_lstm.training.model import bits_per_byte, build


def test_learns_and_reports(run, tmp_path):
    status, out, err = run("--steps", 60, "--lr", "0.05")
    assert status == 0
    assert "tokens/s" in err and "loss" in err  # the progress bar
    assert "bits per byte" in out and "sample: " in out
    curve = losses(saved(tmp_path))
    assert len(curve) == 60 and curve[-1] < curve[0] - 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_compare_agrees(run, dtype, device):
    status, out, _ = run("--steps", 5, "--compare", "--dtype", dtype)
    assert status == 0
    assert "agree at all 5 steps" in out and "nn.LSTM" in out and "triton_lstm" in out
    assert ("Triton kernels" in out) == (dtype != "float64" or DEVICE == "cpu")


def test_compare_detects_a_wrong_lstm(run, monkeypatch):
    """The comparison can fail: an LSTM whose output is 1% too large is detected."""

    class Wrong(triton_lstm.LSTM):
        def forward(self, input, hx=None):
            output, states = super().forward(input, hx)
            return output * 1.01, states

    monkeypatch.setattr(commands, "LSTM", Wrong)
    status, out, _ = run("--steps", 5, "--compare", "--hidden", 32, "--warmup", 1, "--lr", 0.03)
    assert status == 1 and "diverge at step" in out


def test_compare_bound():
    rows = trainer.compare([1.0, 2.0], [1.0, 2.0002], [1.0, 2.0002])
    assert [row["ok"] for row in rows] == [True, True]
    rows = trainer.compare([1.0, 2.0], [1.0, 2.0003], [1.0, 2.0003])
    assert [row["ok"] for row in rows] == [True, False]
    rows = trainer.compare([1.0, 2.0], [1.001, 2.001], [1.0, 2.001])  # the running maximum of the first step counts
    assert [row["ok"] for row in rows] == [True, True]


BAD_INPUT = {
    "missing text": (["--text", "nowhere.txt"], "nowhere.txt: No such file"),
    "a folder as text": (["--text", "."], "is not a regular file. Give readable files"),
    "empty text": (["--text", "empty.txt"], "0 bytes are too few"),
    "short text": (["--text", "short.txt"], "10 bytes are too few, --seq-len 5 needs"),
    "steps": (["--steps", "0"], "must be an integer from 1 to 2147483648, got '0'"),
    "a number of many digits": (["--batch", "9" * 5000], "must be an integer from 1 to"),
    "layers without end": (["--layers", "1000000000"], "must be an integer from 1 to 1000"),
    "learning rate": (["--lr", "-1"], "must be a positive number"),
    "a learning rate beyond float32": (["--lr", "1e39"], "must be a positive number, at most 1e+30"),
    "more steps than text": (["--seq-len", "300000"], "Give more --text, or a smaller --seq-len"),
    "nan": (["--lr", "nan"], "must be a positive number"),
    "seed": (["--seed", "-3"], "must be an integer from 0"),
    "dtype": (["--dtype", "int8"], "invalid choice: 'int8'"),
    "unknown flag": (["--hiden", "3"], "unrecognized arguments: --hiden 3"),
    "resume nothing": (["--resume", "--checkpoint", "nowhere.pt"], "cannot read the checkpoint nowhere.pt"),
    "resume where nothing was trained": (["--resume"], "cannot read the checkpoint runs: No such file"),
    "resume an empty folder": (["--resume", "--checkpoint", "empty"], "contains no checkpoint"),
    "resume no checkpoint": (["--resume", "--checkpoint", "short.txt"], "short.txt is not a checkpoint"),
    "resume half a checkpoint": (
        ["--resume", "--checkpoint", "half.pt"],
        "is damaged: saved by another version",
    ),
    "resume and compare": (["--resume", "--compare"], "Omit --resume"),
    "unwritable": (["--checkpoint", "short.txt/x.pt"], "cannot write the checkpoint"),
    "a folder as checkpoint": (["--checkpoint", ".", "--overwrite"], "cannot write the checkpoint"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line(case, run, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("0123456789")
    torch.save({"config": {}}, tmp_path / "half.pt")
    (tmp_path / "empty").mkdir()
    args, expected = BAD_INPUT[case]
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run("--steps", 1, *args)
    assert status == 2
    assert expected in err and len(err.strip().splitlines()) == 1, err
    assert out == "" or "cannot write" in expected
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


def test_a_run_that_diverges_still_reports(run):
    status, out, _ = run("--steps", 3, "--lr", "1e30")
    assert status == 0 and "sample: " in out


@pytest.mark.parametrize("length", [70, 71, 75, 9 * 512 + 3])
@pytest.mark.parametrize("lstm_class", [nn.LSTM, triton_lstm.LSTM])
def test_every_held_out_byte_counts(lstm_class, length, monkeypatch):
    """Against consecutive windows by hand, with the mean over all bytes; the last window is shorter."""
    monkeypatch.setattr("triton_lstm.training.model.EVALUATED", 512)
    config = dataclasses.replace(SMALL, seq_len=10, batch=2, hidden=8)
    model = build(config, torch.device("cpu"), lstm_class)
    text = torch.randint(256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    losses = []
    with torch.no_grad():
        for start in range(0, length - 1, 10):
            tokens = text[start : start + 11].long().unsqueeze(1)
            scores = model(tokens[:-1])[0]
            losses.append(nn.functional.cross_entropy(scores[:, 0], tokens[1:, 0], reduction="none"))
    expected = torch.cat(losses).double()
    assert len(expected) == length - 1
    got = bits_per_byte(model, text, config, torch.device("cpu"))
    assert math.isclose(got, expected.mean().item() / math.log(2), rel_tol=1e-5)
    assert getattr(model.lstm, "backend", None) is None, "the model goes on training as it did"


def test_held_out_is_in_nats_and_bits(run, text):
    """In the unit of the loss, over the whole twentieth of the text."""
    status, out, _ = run("--steps", 2)
    nats, bits, count = re.search(r"held out: (\S+) nats or (\S+) bits per byte, over all (\S+) bytes", out).groups()
    assert status == 0 and math.isclose(float(nats) / math.log(2), float(bits), abs_tol=2e-3)
    assert int(count) == text.stat().st_size // 20 - 1


@pytest.mark.parametrize(
    "name, value, args",
    [
        ("TRITON_LSTM_BACKEND", "cuda", []),
        ("TRITON_LSTM_BACKEND", "triton", ["--dtype", "float64", "--device", "cuda"]),
        ("TRITON_LSTM_SPIN_LIMIT", "abc", []),
    ],
)
def test_bad_environment_is_one_line(name, value, args, run, device, monkeypatch):
    if "cuda" in args and not torch.cuda.is_available():
        args = ["--device", "cuda"]  # refused for another reason, but in one line as well
    monkeypatch.setenv(name, value)
    status, _, err = run("--steps", 1, *args)
    assert status == 2 and len(err.strip().splitlines()) == 1, err


def test_default_text_is_found():
    text = data.read_text(None, 100)
    training, held_out = data.split(text)
    assert len(text) > 1_000_000 and len(training) + len(held_out) == len(text)
    assert torch.equal(torch.cat([training, held_out]), text)


def test_batches_depend_on_seed_and_step_only():
    text, config = torch.arange(200, dtype=torch.uint8), SMALL
    a = data.window(text, config, 3, torch.device("cpu"))
    assert a.shape == (config.seq_len + 1, config.batch)
    assert torch.equal(a, data.window(text, config, 3, torch.device("cpu")))
    assert not torch.equal(a, data.window(text, config, 4, torch.device("cpu")))
    assert torch.equal(a[1:], a[:-1] + 1)


def test_both_classes_start_from_the_same_weights():
    a, b = (build(SMALL, torch.device("cpu"), cls) for cls in (triton_lstm.LSTM, nn.LSTM))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_no_command_and_module_entry_point():
    done = subprocess.run([sys.executable, "-m", "triton_lstm"], capture_output=True, text=True, cwd=Path("/"))
    assert done.returncode == 2 and "COMMAND" in done.stderr and len(done.stderr.strip().splitlines()) == 1
