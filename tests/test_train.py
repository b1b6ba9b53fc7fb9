"""The main job, through its command line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import triton_lstm
from triton_lstm import cli, train
from triton_lstm.config import SMALL

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


def losses(path) -> list[float]:
    return torch.load(path, weights_only=True)["losses"]


def test_learns_and_reports(run, tmp_path):
    status, out, err = run("--steps", 60, "--lr", "0.05")
    assert status == 0
    assert "tokens/s" in err and "loss" in err  # the progress bar
    assert "bits per byte" in out and "sample: " in out
    curve = losses(tmp_path / "runs/train.pt")
    assert len(curve) == 60 and curve[-1] < curve[0] - 1


def test_resume_gives_the_same_losses(run, tmp_path):
    assert run("--steps", 8, "--checkpoint", "whole.pt")[0] == 0
    assert run("--steps", 4, "--checkpoint", "parts.pt")[0] == 0
    assert run("--steps", 8, "--checkpoint", "parts.pt", "--resume", text=None)[0] == 0
    assert losses(tmp_path / "parts.pt") == losses(tmp_path / "whole.pt")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_compare_agrees(run, dtype):
    status, out, _ = run("--steps", 5, "--compare", "--dtype", dtype)
    assert status == 0
    assert "agree at all 5 steps" in out and "nn.LSTM" in out and "triton_lstm" in out
    assert ("Triton kernels" in out) == (dtype != "float64" or DEVICE == "cpu")


def test_compare_finds_a_wrong_lstm(run, monkeypatch):
    """The comparison can fail: an LSTM whose output is 1% too large is found out."""

    class Wrong(triton_lstm.LSTM):
        def forward(self, input, hx=None):
            output, states = super().forward(input, hx)
            return output * 1.01, states

    monkeypatch.setattr(cli, "LSTM", Wrong)
    status, out, _ = run("--steps", 5, "--compare", "--hidden", 32)
    assert status == 1 and "part at step" in out


def test_compare_bound():
    rows = train.compare([1.0, 2.0], [1.0, 2.0002], [1.0, 2.0002])
    assert [row["ok"] for row in rows] == [True, True]
    rows = train.compare([1.0, 2.0], [1.0, 2.0003], [1.0, 2.0003])
    assert [row["ok"] for row in rows] == [True, False]
    rows = train.compare([1.0, 2.0], [1.001, 2.001], [1.0, 2.001])  # the running maximum of the first step counts
    assert [row["ok"] for row in rows] == [True, True]


BAD_INPUT = {
    "missing text": (["--text", "nowhere.txt"], "nowhere.txt: No such file"),
    "a folder as text": (["--text", "."], "is not a regular file. Give readable files"),
    "empty text": (["--text", "empty.txt"], "0 bytes are too few"),
    "short text": (["--text", "short.txt"], "10 bytes are too few, --seq-len 5 needs"),
    "steps": (["--steps", "0"], "must be a whole number from 1 up, got '0'"),
    "learning rate": (["--lr", "-1"], "must be a number above 0"),
    "nan": (["--lr", "nan"], "must be a number above 0"),
    "seed": (["--seed", "-3"], "must be a whole number from 0"),
    "dtype": (["--dtype", "int8"], "invalid choice: 'int8'"),
    "unknown flag": (["--hiden", "3"], "unrecognized arguments: --hiden 3"),
    "resume nothing": (["--resume", "--checkpoint", "nowhere.pt"], "cannot read the checkpoint nowhere.pt"),
    "resume no checkpoint": (["--resume", "--checkpoint", "short.txt"], "short.txt is no checkpoint"),
    "resume half a checkpoint": (["--resume", "--checkpoint", "half.pt"], "half.pt is no checkpoint"),
    "resume and compare": (["--resume", "--compare"], "Leave out --resume"),
    "unwritable": (["--checkpoint", "short.txt/x.pt"], "cannot write the checkpoint"),
    "a folder as checkpoint": (["--checkpoint", ".", "--overwrite"], "cannot write the checkpoint"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line(case, run, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("0123456789")
    torch.save({"config": {}}, tmp_path / "half.pt")
    args, expected = BAD_INPUT[case]
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run("--steps", 1, *args)
    assert status == 2
    assert expected in err and len(err.strip().splitlines()) == 1, err
    assert out == "" or "cannot write" in expected
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


def damaged(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("model"),
        lambda c: c.pop("text"),
        lambda c: c["model"].pop("head.bias"),
        lambda c: c["config"].update(hidden=9),
        lambda c: c["config"].update(hidden="8"),
        lambda c: c["config"].update(batch=0),
        lambda c: c["config"].update(dtype="int8"),
        lambda c: c.update(losses=[None]),
    ],
)
def test_resume_from_a_malformed_checkpoint(change, run, tmp_path):
    assert run("--steps", 2)[0] == 0
    damaged(tmp_path / "runs/train.pt", change)
    status, _, err = run("--steps", 3, "--resume", text=None)
    assert status == 2 and len(err.strip().splitlines()) == 1 and "start afresh" in err.lower(), err


def test_resume_from_flipped_bits(run, tmp_path):
    """torch.load would take them: it does not look at the archive's checksums."""
    assert run("--steps", 2)[0] == 0
    path = tmp_path / "runs/train.pt"
    weights = torch.load(path, weights_only=True)["model"]["lstm.weight_hh_l0"].numpy().tobytes()
    content = path.read_bytes()
    assert weights in content
    path.write_bytes(content.replace(weights, bytes(255 - b for b in weights)))
    status, _, err = run("--steps", 3, "--resume")
    assert status == 2 and "is damaged" in err


def test_resume_on_another_text(run, tmp_path):
    assert run("--steps", 2)[0] == 0
    (tmp_path / "other.txt").write_bytes(b"something else entirely " * 40)
    status, _, err = run("--steps", 3, "--resume", text=tmp_path / "other.txt")
    assert status == 2 and "was trained on another text" in err


def test_overwrite_replaces_checkpoints_only(run, text):
    before = text.read_bytes()
    status, _, err = run("--steps", 2, "--checkpoint", text, "--overwrite")
    assert status == 2 and "is the text to train on" in err
    (text.parent / "notes.txt").write_text("dear")
    status, _, err = run("--steps", 2, "--checkpoint", "notes.txt", "--overwrite")
    assert status == 2 and "is no checkpoint" in err
    assert text.read_bytes() == before and (text.parent / "notes.txt").read_text() == "dear"


def test_a_run_that_diverges_still_reports(run):
    status, out, _ = run("--steps", 3, "--lr", "1e30")
    assert status == 0 and "sample: " in out


def test_evaluation_of_a_large_text():
    """More bytes than float32 counts exactly."""
    config = SMALL
    model = train.build(config, torch.device("cpu"), nn.LSTM)
    text = torch.zeros(2**24 + 3 + config.seq_len + 1, dtype=torch.uint8)
    assert train.bits_per_byte(model, text, config, torch.device("cpu")) > 0


@pytest.mark.parametrize(
    "name, value, args",
    [
        ("TRITON_LSTM_BACKEND", "cuda", []),
        ("TRITON_LSTM_BACKEND", "triton", ["--dtype", "float64", "--device", "cuda"]),
        ("TRITON_LSTM_SPIN_LIMIT", "abc", []),
    ],
)
def test_bad_environment_is_one_line(name, value, args, run, monkeypatch):
    if "cuda" in args and not torch.cuda.is_available():
        args = ["--device", "cuda"]  # refused for another reason, but in one line as well
    monkeypatch.setenv(name, value)
    status, _, err = run("--steps", 1, *args)
    assert status == 2 and len(err.strip().splitlines()) == 1, err


def test_resume_with_another_shape(run):
    assert run("--steps", 2)[0] == 0
    status, _, err = run("--resume", "--steps", 3, "--hidden", 16)
    assert status == 2 and "was trained with --hidden 8, not 16" in err and len(err.strip().splitlines()) == 1
    status, _, err = run("--resume", "--steps", 2)
    assert status == 2 and "is at step 2 already" in err


def test_a_checkpoint_is_not_overwritten_unasked(run, tmp_path):
    assert run("--steps", 2)[0] == 0
    before = (tmp_path / "runs/train.pt").read_bytes()
    status, _, err = run("--steps", 3)
    assert status == 2 and "--overwrite" in err
    assert (tmp_path / "runs/train.pt").read_bytes() == before
    assert run("--steps", 3, "--overwrite")[0] == 0


def test_a_failed_save_leaves_the_old_checkpoint(run, tmp_path, monkeypatch):
    assert run("--steps", 2)[0] == 0
    before = (tmp_path / "runs/train.pt").read_bytes()

    def full(content, file):  # as torch.save does it: its archive cannot be closed any more
        file.write(b"half")
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904

    monkeypatch.setattr(torch, "save", full)
    status, _, err = run("--steps", 3, "--resume")
    assert status == 2 and "No space left on device" in err
    assert (tmp_path / "runs/train.pt").read_bytes() == before
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["train.pt"]


def test_ctrl_c_saves_and_resumes_to_the_same_losses(tmp_path, text):
    """A real process and a real signal."""
    base = [sys.executable, "-m", "triton_lstm", "train", *TINY, "--text", str(text)]
    process = subprocess.Popen(
        [*base, "--steps", "100000", "--checkpoint", "cut.pt"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while b"step/s" not in (seen := process.stderr.read1()) or b" 0/" in seen:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err
    done = len(losses(tmp_path / "cut.pt"))
    assert f"stopped after step {done}; go on with: train --resume --checkpoint cut.pt" in out.decode()
    for name, extra in (("cut.pt", ["--resume"]), ("whole.pt", [])):
        subprocess.run(
            [*base, "--steps", str(done + 3), "--checkpoint", name, *extra],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
    assert losses(tmp_path / "cut.pt") == losses(tmp_path / "whole.pt")


def test_default_text_is_found():
    text = train.read_text(None, 100)
    training, held_out = train.split(text)
    assert len(text) > 1_000_000 and len(training) + len(held_out) == len(text)
    assert torch.equal(torch.cat([training, held_out]), text)


def test_batches_depend_on_seed_and_step_only():
    text, config = torch.arange(200, dtype=torch.uint8), SMALL
    a = train.window(text, config, 3, torch.device("cpu"))
    assert a.shape == (config.seq_len + 1, config.batch)
    assert torch.equal(a, train.window(text, config, 3, torch.device("cpu")))
    assert not torch.equal(a, train.window(text, config, 4, torch.device("cpu")))
    assert torch.equal(a[1:], a[:-1] + 1)


def test_both_classes_start_from_the_same_weights():
    a, b = (train.build(SMALL, torch.device("cpu"), cls) for cls in (triton_lstm.LSTM, nn.LSTM))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_no_command_and_module_entry_point():
    done = subprocess.run([sys.executable, "-m", "triton_lstm"], capture_output=True, text=True, cwd=Path("/"))
    assert done.returncode == 2 and "COMMAND" in done.stderr and len(done.stderr.strip().splitlines()) == 1
