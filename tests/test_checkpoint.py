"""Checkpoints of `train`: the same losses after --resume, nothing lost, nothing believed unseen."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from training import TINY, losses


def test_resume_gives_the_same_losses(run, tmp_path):
    assert run("--steps", 8, "--checkpoint", "whole.pt")[0] == 0
    assert run("--steps", 4, "--checkpoint", "parts.pt")[0] == 0
    assert run("--steps", 8, "--checkpoint", "parts.pt", "--resume", text=None)[0] == 0
    assert losses(tmp_path / "parts.pt") == losses(tmp_path / "whole.pt")


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
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 - nor does torch.save say from what

    monkeypatch.setattr(torch, "save", full)
    status, _, err = run("--steps", 3, "--resume")
    assert status == 2 and "No space left on device" in err
    assert (tmp_path / "runs/train.pt").read_bytes() == before
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["train.pt"]


@pytest.mark.parametrize("steps", [3, 1], ids=["on the way", "at the end"])
def test_ctrl_c_during_a_save_is_not_forgotten(steps, run, tmp_path, monkeypatch):
    shipped = torch.save

    def interrupted(content, file):
        signal.raise_signal(signal.SIGINT)
        shipped(content, file)

    monkeypatch.setattr(torch, "save", interrupted)
    status, out, _ = run("--steps", steps, "--save-every", 1)
    assert status == 130 and "stopped after step 1; go on with" in out
    assert len(losses(tmp_path / "runs/train.pt")) == 1


def test_ctrl_c_saves_and_resumes_to_the_same_losses(tmp_path, text):
    """A real process and a real signal."""
    base = [sys.executable, "-m", "triton_lstm", "train", *TINY, "--text", str(text)]
    process = subprocess.Popen(
        [*base, "--steps", "100000", "--checkpoint", "cut.pt"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while b"/100000" not in (seen := process.stderr.read1()) or b" 0/" in seen:
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
