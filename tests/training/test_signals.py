"""Signals, real ones to real processes: the same losses, bit for bit, as without."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("pydantic", reason="the configuration needs pydantic")
pytest.importorskip("cyclopts", reason="the options of `train` need cyclopts")
pytest.importorskip("safetensors", reason="checkpoints need safetensors")
import safetensors.torch
from child import python_path
from training import assert_same, last, losses, rows, runs

from triton_lstm.training.run_folder import RunFolder


@pytest.mark.parametrize("steps", [3, 1], ids=["on the way", "at the end"])
def test_ctrl_c_during_a_save_is_deferred(steps, run, tmp_path, monkeypatch, quick):
    shipped = safetensors.torch.save

    def interrupted(*args, **kwargs):
        monkeypatch.setattr(safetensors.torch, "save", shipped)
        signal.raise_signal(signal.SIGINT)
        return shipped(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save", interrupted)
    status, out, _ = run("--steps", steps, "--save-every", 1)
    assert status == 130 and "stopped after step 1" in out and ("continue with" in out) == (steps == 3)
    assert last(runs(tmp_path)[0]).name == "step_00000001"


def test_ctrl_c_that_torchrun_sends_again(run, tmp_path, monkeypatch, quick):
    """Each process has it from the terminal as well; that is no second Ctrl-C, which would not save."""
    from triton_lstm.training.trainer import Trainer

    shipped = Trainer.train

    def interrupted(self, *args, **kwargs):
        if self.step == 1:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
        return shipped(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", interrupted)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    status, out, _ = run("--steps", 9)
    assert status == 130 and "stopped after step 2; continue with" in out


@pytest.mark.parametrize("steps", [9, 6], ids=["on the way", "at the end"])
def test_a_validation_that_a_signal_prevents_comes_later(steps, run, tmp_path, monkeypatch, quick):
    from triton_lstm.training import loop

    options = ["--steps", steps, "--validate-every", 3]
    assert run(*options, "--folder", "whole")[0] == 0
    validate = loop.held_out_loss

    def interrupted(model, *rest):
        if len(losses(tmp_path / "parts")) == 6:
            signal.raise_signal(signal.SIGTERM)
        return validate(model, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "held_out_loss", interrupted)
        status, out, _ = run(*options, "--folder", "parts")
    assert status == 130 and "stopped after step 6; continue with: " in out
    assert [row["step"] for row in rows(tmp_path / "parts") if row["validation_loss"]] == ["3"]
    status, out, _ = run("--resume", "--folder", "parts", text=None)
    assert status == 0 and "held out: " in out
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert_same(last(tmp_path / "parts"), last(tmp_path / "whole"))
    assert run("--resume", "--folder", "parts", text=None)[0] == 2  # nothing is left to do


def first_step(process) -> None:
    """Waits until the progress bar has counted a step."""
    while not re.search(rb" [1-9]\d*/\d", process.stderr.read1()):
        assert process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_saves_and_the_printed_command_resumes(number, train_process, run, tmp_path):
    """A real process and a real signal; with the same losses as an uninterrupted run."""
    constant = ["--schedule", "constant"]
    process = train_process("--steps", 100000, "--folder", "a run's", *constant)
    first_step(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and b"Traceback" not in err
    done = len(losses(tmp_path / "a run's"))
    said, _, line = out.decode().splitlines()[-1].partition("; continue with: ")
    assert said == f"stopped after step {done}"
    python, *command = shlex.split(line)
    assert python == sys.executable and command == ["-m", "triton_lstm", "train", "--resume", "--folder", "a run's"]
    assert run(*command[3:], "--steps", done + 2, text=None)[0] == 0
    assert run("--steps", done + 2, "--folder", "whole", *constant)[0] == 0
    assert losses(tmp_path / "a run's") == losses(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_to_all_processes_saves(number, train_process, run, tmp_path, quick):
    """Workers too, as from a terminal or a scheduler."""
    process = train_process("--steps", 100000, "--folder", "a", "--workers", 2, "--schedule", "constant", alone=True)
    first_step(process)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and b"Traceback" not in err, err
    done = len(losses(tmp_path / "a"))
    assert f"stopped after step {done}; continue with: " in out.decode()
    assert run("--resume", "--folder", "a", "--steps", done + 2, "--workers", 0, text=None)[0] == 0
    assert run("--steps", done + 2, "--folder", "whole", "--schedule", "constant")[0] == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "whole")


def test_a_worker_that_dies_ends_the_run(train_process, tmp_path, quick):
    process = train_process("--steps", 100000, "--folder", "a", "--workers", 2, "--save-every", 1)
    first_step(process)
    (worker, *_) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    last_line = err.decode().splitlines()[-1]
    assert process.returncode == 2 and "Traceback" not in err.decode()
    assert "DataLoader worker" in last_line and "continue with: " in last_line


def test_kill_9_at_any_moment_loses_only_the_steps_since_the_last_checkpoint(train_process, run, tmp_path, quick):
    """Killed again and again, while it saves after every step; in the end nothing differs."""
    options = ["--steps", 500, "--validate-every", 70, "--log-every", 2]
    assert run(*options, "--folder", "whole")[0] == 0
    more = ["--save-every", 1, "--keep", 2, "--folder", "killed"]
    started, kills = [*options, *more], 0
    for k in range(12):
        process = train_process(*started)
        first_step(process)
        time.sleep(0.02 * k)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        started = ["--resume", "--folder", "killed"]
        checkpoints = RunFolder(tmp_path / "killed").steps()
        assert checkpoints and len(checkpoints) <= 4  # two, the best one, and one that is to be deleted
        if checkpoints[-1].name == "step_00000500":
            break
    assert kills >= 3
    if checkpoints[-1].name != "step_00000500":
        assert run("--resume", "--folder", "killed", text=None)[0] == 0
    found, expected = rows(tmp_path / "killed"), rows(tmp_path / "whole")
    assert found == expected
    assert_same(last(tmp_path / "killed"), last(tmp_path / "whole"))
    assert not list((tmp_path / "killed/checkpoints").glob("*.tmp"))


def test_an_ignored_ctrl_c_stays_ignored(train_process):
    """As in a background job of a script, and as nohup does with SIGHUP."""
    ignoring = "import os, signal; from sys import argv; signal.signal(2, signal.SIG_IGN); os.execv(argv[1], argv[1:])"
    process = train_process("--steps", 1000000, before=[sys.executable, "-c", ignoring])
    first_step(process)
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
        env=os.environ | {"PYTHONPATH": python_path(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and err == b""
