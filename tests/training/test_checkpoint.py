"""Checkpoints of `train`: the same losses after --resume, nothing is lost, everything is validated."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pydantic", reason="the schema of checkpoints needs pydantic")
import torch
from training import TINY, losses, saved


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
        lambda c: c.pop("format"),
        lambda c: c.update(extra=1),
        lambda c: c.update(text=5),
        lambda c: c.update(text=["missing\nhere"]),
        lambda c: c.update(text=["\0"]),
        lambda c: c.update(digest="f" * 64),
        lambda c: c["config"].update(lr=float("nan")),
        lambda c: c["config"].update(lr=1e308),
        lambda c: c["config"].update(seed=10**25),
        lambda c: c["config"].update(layers=10**6),
        lambda c: c.pop("exp_avg"),
        lambda c: c["exp_avg"].pop("head.bias"),
        lambda c: c["exp_avg_sq"].update({"head.bias": torch.zeros(3)}),
        lambda c: c["model"].update({"head.bias": torch.zeros(256, dtype=torch.int32)}),
        lambda c: c["model"].update({"head.bias": c["model"]["head.bias"].to("meta")}),
        lambda c: c["exp_avg"].update({"head.bias": c["exp_avg"]["head.bias"].to("meta")}),
        lambda c: c["exp_avg_sq"]["head.bias"].sub_(1),
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
    damaged(saved(tmp_path), change)
    status, _, err = run("--steps", 3, "--resume", text=None)
    assert status == 2 and len(err.strip().splitlines()) == 1 and "Traceback" not in err, err


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["config"].update(hidden=9), "or is damaged: the tensors do not match the sizes. Start"),
        (lambda c: c["exp_avg_sq"]["head.bias"].sub_(1), "or is damaged: a second moment is negative. Start"),
    ],
)
def test_the_error_names_the_problem(change, message, run, tmp_path):
    assert run("--steps", 2)[0] == 0
    damaged(saved(tmp_path), change)
    assert message in run("--steps", 3, "--resume", text=None)[2]


def test_pytorchs_warnings_about_an_invalid_file_are_hidden(run, tmp_path, recwarn):
    torch.save({"a": torch.zeros(2)}, tmp_path / "strange.pt", pickle_protocol=4)
    status, _, err = run("--steps", 3, "--resume", "--checkpoint", "strange.pt")
    assert status == 2 and "is damaged" in err and not recwarn.list


def test_resume_from_a_file_with_flipped_bits(run, tmp_path):
    """torch.load would take them: it does not verify the checksums of the archive."""
    assert run("--steps", 2)[0] == 0
    path = saved(tmp_path)
    weights = torch.load(path, weights_only=True)["model"]["lstm.weight_hh_l0"].cpu().numpy().tobytes()
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
    assert status == 2 and "is not a checkpoint" in err
    assert text.read_bytes() == before and (text.parent / "notes.txt").read_text() == "dear"


def test_resume_with_another_shape(run):
    assert run("--steps", 2)[0] == 0
    status, _, err = run("--resume", "--steps", 3, "--hidden", 16)
    assert status == 2 and "was trained with --hidden 8, not 16" in err and len(err.strip().splitlines()) == 1
    status, _, err = run("--resume", "--steps", 2)
    assert status == 2 and "is already at step 2" in err


def test_a_checkpoint_is_not_overwritten_by_default(run, tmp_path):
    assert run("--steps", 2)[0] == 0
    before = (saved(tmp_path)).read_bytes()
    assert run("--steps", 2)[0] == 0  # in a folder of its own, also within the same second
    first, second = sorted(tmp_path.glob("runs/*/train.pt"), key=lambda path: path.stat().st_mtime_ns)
    assert first.read_bytes() == before
    assert run("--steps", 3, "--resume")[0] == 0
    assert (len(losses(first)), len(losses(second))) == (2, 3)
    status, _, err = run("--steps", 3, "--checkpoint", first)
    assert status == 2 and "--overwrite" in err
    assert first.read_bytes() == before
    assert run("--steps", 3, "--checkpoint", first, "--overwrite")[0] == 0


def test_a_failed_save_leaves_the_old_checkpoint(run, tmp_path, monkeypatch):
    assert run("--steps", 2)[0] == 0
    before = (saved(tmp_path)).read_bytes()

    def full(content, file):  # as torch.save does it: its archive cannot be closed any more
        file.write(b"half")
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 - nor does torch.save say from what

    monkeypatch.setattr(torch, "save", full)
    status, _, err = run("--steps", 3, "--resume")
    assert status == 2 and "No space left on device" in err
    assert (saved(tmp_path)).read_bytes() == before
    assert [path.name for path in saved(tmp_path).parent.iterdir()] == ["train.pt"]


def test_leftovers_of_killed_processes_are_removed(run, tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    for left in (ended.pid, os.getppid()):  # dead, and alive
        (tmp_path / f"a[1].pt.{left}.tmp").touch()
    (tmp_path / f"b.pt.{ended.pid}.tmp").touch()
    assert run("--steps", 1, "--checkpoint", "a[1].pt")[0] == 0
    assert sorted(path.name for path in tmp_path.glob("*.tmp")) == sorted(
        [f"a[1].pt.{os.getppid()}.tmp", f"b.pt.{ended.pid}.tmp"]
    )


def test_leftovers_of_killed_runs_are_removed(run, tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    (tmp_path / "runs" / "a").mkdir(parents=True)
    left = tmp_path / "runs" / "a" / f"train.pt.{ended.pid}.tmp"
    left.touch()
    assert run("--steps", 1)[0] == 0 and not left.exists()


@pytest.mark.parametrize("steps", [3, 1], ids=["on the way", "at the end"])
def test_ctrl_c_during_a_save_is_deferred(steps, run, tmp_path, monkeypatch):
    shipped = torch.save

    def interrupted(content, file):
        signal.raise_signal(signal.SIGINT)
        shipped(content, file)

    monkeypatch.setattr(torch, "save", interrupted)
    status, out, _ = run("--steps", steps, "--save-every", 1)
    assert status == 130 and "stopped after step 1" in out and ("continue with" in out) == (steps == 3)
    assert len(losses(saved(tmp_path))) == 1


@pytest.fixture
def training(tmp_path, text):
    """Starts `train` in another process; waits for its first step."""
    started = []

    def start(*args, before=()):
        command = [sys.executable, "-m", "triton_lstm", "train", *TINY, "--text", str(text), *args]
        alike = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # last bits depend on it
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process = subprocess.Popen([*before, *command], cwd=tmp_path, env=alike, **pipes)
        started.append(process)
        while not re.search(rb" [1-9]\d*/\d", process.stderr.read1()):
            assert process.poll() is None
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_saves_and_the_printed_command_resumes(number, training, run, tmp_path):
    """A real process and a real signal; with the same losses as an uninterrupted run."""
    process = training("--steps", "100000", "--checkpoint", "a run's.pt")
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and b"Traceback" not in err
    done = len(losses(tmp_path / "a run's.pt"))
    said, _, line = out.decode().splitlines()[-1].partition("; continue with: ")
    assert said == f"stopped after step {done}"
    python, *command = shlex.split(line)
    assert python == sys.executable and command[:2] == ["-m", "triton_lstm"]
    assert command[2:8] == ["train", "--resume", "--checkpoint", "a run's.pt", "--steps", "100000"]
    assert run(*command[3:], "--steps", done + 2, text=None)[0] == 0
    assert run("--steps", done + 2, "--checkpoint", "whole.pt")[0] == 0
    assert losses(tmp_path / "a run's.pt") == losses(tmp_path / "whole.pt")


def test_an_ignored_ctrl_c_stays_ignored(training):
    """As in a background job of a script, and as nohup does with SIGHUP."""
    ignoring = "import os, signal; from sys import argv; signal.signal(2, signal.SIG_IGN); os.execv(argv[1], argv[1:])"
    process = training("--steps", "1000000", before=[sys.executable, "-c", ignoring])
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 130


@pytest.mark.parametrize("start", ["-m", "script"])
def test_ctrl_c_while_pytorch_is_imported(start, tmp_path):
    """A stand-in for torch that says that it is being imported; the reader answers with Ctrl-C."""
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(300)\n"
    (tmp_path / "torch.py").write_text(slow)
    (tmp_path / "triton-lstm").write_text("from triton_lstm.cli.main import main\nmain()\n")
    command = ["-m", "triton_lstm"] if start == "-m" else [str(tmp_path / "triton-lstm")]
    process = subprocess.Popen(
        [sys.executable, *command, "doctor"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and err == b""
