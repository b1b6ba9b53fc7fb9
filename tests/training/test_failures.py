"""What goes wrong around a run: full disks, other processes, memory; nothing that was saved is lost."""

import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("pydantic", reason="the configuration needs pydantic")
pytest.importorskip("cyclopts", reason="the options of `train` need cyclopts")
pytest.importorskip("safetensors", reason="checkpoints need safetensors")
import safetensors.torch
import torch
from training import assert_same, content, last, losses, read, rows, saved

from triton_lstm.settings import UsageError
from triton_lstm.training.run_folder import RunFolder


def test_two_processes_in_one_run_are_refused(run, tmp_path, quick):
    assert run("--steps", 1, "--folder", "a")[0] == 0
    with RunFolder(tmp_path / "a").locked():
        status, _, err = run("--resume", "--folder", "a", "--steps", 2)
    assert status == 2 and "in use by another process" in err
    assert run("--resume", "--folder", "a", "--steps", 2)[0] == 0


def test_a_process_that_went_on_meanwhile(run, tmp_path, monkeypatch, quick):
    """Between reading a checkpoint and locking the run: its steps are not repeated, nor their rows deleted."""
    from triton_lstm.training.text import corpus

    assert run("--steps", 2, "--folder", "a")[0] == 0
    opened = corpus.open_corpus
    path = tmp_path / "a/checkpoints"

    def slow(data):
        shutil.copytree(path / "step_00000002", path / "step_00000004", dirs_exist_ok=True)
        return opened(data)

    before = (tmp_path / "a/metrics.csv").read_bytes()
    monkeypatch.setattr(corpus, "open_corpus", slow)
    status, _, err = run("--resume", "--folder", "a", "--steps", 3)
    assert status == 2 and "another process has gone on with a meanwhile. Start again" in err
    assert (tmp_path / "a/metrics.csv").read_bytes() == before


def test_a_full_disk_leaves_the_old_checkpoint(run, tmp_path, monkeypatch, quick):
    assert run("--steps", 2)[0] == 0
    path = saved(tmp_path)
    before = content(path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save", full)
        status, _, err = run("--steps", 3, "--resume")
    assert status == 2 and "No space left on device. Free some space, and continue with: " in err
    assert content(path) == before and last(path.parents[1]) == path
    assert run("--steps", 3, "--resume")[0] == 0  # the row of step 3 is written anew
    assert not list(path.parent.glob("*.tmp"))
    assert [row["step"] for row in rows(path.parents[1])] == ["1", "2", "2", "3", "3"]


def test_a_full_disk_while_logging_saves(run, tmp_path, monkeypatch, quick):
    """A row that cannot be written ends the run, but not without a checkpoint, if there is room for that."""
    from triton_lstm.training.logs.metrics import Metrics

    log = Metrics.log

    def full(self, step, **values):
        if step == 3:
            raise OSError(28, "No space left on device")
        log(self, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "log", full)
        status, _, err = run("--steps", 5, "--folder", "a")
    assert status == 2 and "No space left on device. Free some space, and continue with: " in err
    assert last(tmp_path / "a").name == "step_00000003"
    assert run("--resume", "--folder", "a", text=None)[0] == 0
    assert run("--steps", 5, "--folder", "b")[0] == 0
    assert_same(last(tmp_path / "a"), last(tmp_path / "b"))


def test_whatever_fails_between_steps_saves(run, tmp_path, monkeypatch, quick):
    from triton_lstm.training import loop

    def too_large(*args):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "held_out_loss", too_large)
        status, _, err = run("--steps", 5, "--validate-every", 4, "--folder", "a")
    assert status == 2 and "continue with: " in err and err.endswith("or add --recompute.\n")
    assert last(tmp_path / "a").name == "step_00000004"
    assert run("--resume", "--folder", "a", "--recompute", text=None)[0] == 0
    assert run("--steps", 5, "--validate-every", 4, "--folder", "b")[0] == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_a_run_without_a_checkpoint_begins_again(run, tmp_path, monkeypatch, quick):
    """As one that was killed early, and whose folder is there."""
    from triton_lstm.training.trainer import Trainer

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "prepare", fails)
        assert run("--steps", 2, "--folder", "a")[0] == 2
    assert "start it without --resume" in run("--resume", "--folder", "a")[2]
    assert run("--steps", 2, "--folder", "a")[0] == 0 and len(losses(tmp_path / "a")) == 2


def test_a_best_model_that_cannot_be_saved_is_not_the_best(run, tmp_path, monkeypatch, quick):
    def full(self, step):
        if step == 2:
            raise UsageError("No space left on device")
        mark(self, step)

    mark = RunFolder.mark_best
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "mark_best", full)
        assert run("--steps", 3, "--validate-every", 1, "--lr", 0.1, "--warmup", 0, "--folder", "a")[0] == 2
    best = tmp_path / "a/checkpoints/best"
    assert read(best)[0]["step"] == 1
    assert run("--resume", "--folder", "a", text=None)[0] == 0
    state, _ = read(best)
    assert state["step"] == state["progress"]["best"]["step"] > 1


def test_a_renamed_checkpoint_is_refused(run, tmp_path, quick):
    assert run("--steps", 2, "--folder", "a")[0] == 0
    path = tmp_path / "a/checkpoints/step_00000002"
    path.rename(path.with_name("step_00000009"))
    status, _, err = run("--resume", "--folder", "a", "--steps", 20)
    assert status == 2 and "step_00000009 was renamed: it is of step 2" in err


def test_leftovers_of_killed_runs_are_removed(run, tmp_path, quick):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    assert run("--steps", 1, "--folder", "a[1]")[0] == 0
    folder = tmp_path / "a[1]/checkpoints"
    for left in ("step_00000009.tmp", "step_00000001.deleted"):
        (folder / left).mkdir()
        (folder / left / "part.safetensors").touch()
    for left in (ended.pid, os.getppid()):  # dead, and alive
        (folder / f"best.{left}.tmp").touch()
    assert run("--steps", 2, "--resume", "--folder", "a[1]")[0] == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["best", f"best.{os.getppid()}.tmp", "step_00000001", "step_00000002"]
