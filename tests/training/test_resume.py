"""Runs that go on: the same losses, bit for bit, however they were stopped."""

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
import torch
from training import last, losses, rows, runs, saved

from triton_lstm.settings import UsageError
from triton_lstm.training.run_folder import RunFolder

EXACT = {
    "streams": [],
    "windows": ["--batches", "windows"],
    "an epoch's end": ["--seq-len", 60],
    "dropout": ["--dropout", 0.4, "--workers", 2],
    "fp16 and accumulation": ["--dtype", "fp16", "--accumulate", 2, "--batch", 2],
    "bf16": ["--dtype", "bf16", "--clip", "off", "--schedule", "constant"],
    "rows of several steps": ["--log-every", 3],
    "no resets": ["--no-reset", "--recompute"],
}


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_the_same_metrics_as_without_a_stop(options, run, tmp_path, quick):
    """Losses, learning rates, gradient norms and validations, and the whole state at the end."""
    whole = ["--steps", 8, "--validate-every", 4, *options]
    assert run(*whole, "--run", "whole")[0] == 0
    assert run(*whole, "--run", "parts", "--save-every", 5, "--keep", 9)[0] == 0
    (tmp_path / "parts/checkpoints/step_00000008.pt").unlink()
    assert run("--resume", "--run", "parts", text=None)[0] == 0
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert_same(last(tmp_path / "parts"), last(tmp_path / "whole"))


def assert_same(a: Path, b: Path) -> None:
    """Two checkpoints of the same state, whatever time it took and how often it was saved."""
    left, right = (torch.load(path, weights_only=True) for path in (a, b))
    for content in (left, right):
        for name in ("config", "digest"):
            assert content.pop(name)
        assert content["progress"].pop("seconds")
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def test_the_same_losses_with_the_kernels(run, tmp_path):
    assert run("--steps", 6, "--run", "whole")[0] == 0
    assert run("--steps", 6, "--run", "parts", "--save-every", 3, "--keep", 9)[0] == 0
    (tmp_path / "parts/checkpoints/step_00000006.pt").unlink()
    assert run("--resume", "--run", "parts", text=None)[0] == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_more_steps(run, tmp_path, quick):
    """With a constant rate a longer run has the same losses; the newest run is the one that goes on."""
    constant = ["--schedule", "constant"]
    assert run("--steps", 8, *constant, "--run", "whole")[0] == 0
    assert run("--steps", 4, *constant)[0] == 0
    status, out, _ = run("--resume", "--steps", 8, text=None)
    assert status == 0 and "from step 4" in out
    (run_folder,) = runs(tmp_path)
    assert losses(run_folder) == losses(tmp_path / "whole")


CHANGED = {
    "hidden": (["--hidden", 16], "was trained with --hidden 8, not 16. Omit the option"),
    "batch": (["--batch", 2], "was trained with --batch 4, not 2"),
    "betas": (["--betas", 0.5, 0.6], "was trained with --betas 0.8 0.95, not 0.5 0.6"),
    "clip": (["--clip", "off"], "was trained with --clip 1.0, not off"),
    "separator": (["--separator", "x"], "was trained with --separator \\n, not x"),
    "steps": (["--steps", 2], "is already at step 2. Give a larger --steps"),
    "a config": (["--config", "other.yaml"], "was trained with --seed 0, not 7"),
    "compare": (["--compare"], "Omit --resume"),
}


@pytest.mark.parametrize("options, message", CHANGED.values(), ids=CHANGED)
def test_what_does_not_fit_is_refused(options, message, run, tmp_path, quick):
    (tmp_path / "other.yaml").write_text("seed: 7")
    assert run("--steps", 2)[0] == 0
    before = saved(tmp_path).read_bytes()
    status, out, err = run("--resume", "--steps", 3, *options)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert saved(tmp_path).read_bytes() == before and out == ""


def test_another_text_is_refused(run, tmp_path, quick):
    assert run("--steps", 2)[0] == 0
    (tmp_path / "other.txt").write_bytes(b"something else entirely\n" * 40)
    status, _, err = run("--steps", 3, "--resume", text=tmp_path / "other.txt")
    assert status == 2 and "was trained on another text" in err


def test_a_text_that_moved_is_accepted(run, text, tmp_path, quick):
    """The content counts, not the path."""
    assert run("--steps", 2)[0] == 0
    text.rename(tmp_path / "moved.txt")
    assert run("--steps", 3, "--resume", text=None)[0] == 2
    assert run("--steps", 3, "--resume", text=tmp_path / "moved.txt")[0] == 0


def test_the_last_checkpoints_and_the_best_one_are_kept(run, tmp_path, quick):
    assert run("--steps", 7, "--save-every", 1, "--validate-every", 1, "--keep", 2)[0] == 0
    (run_folder,) = runs(tmp_path)
    names = sorted(path.name for path in (run_folder / "checkpoints").iterdir())
    assert names == ["best.pt", "step_00000006.pt", "step_00000007.pt"]
    validated = {int(row["step"]): float(row["validation_loss"]) for row in rows(run_folder) if row["validation_loss"]}
    best = torch.load(run_folder / "checkpoints/best.pt", weights_only=True)
    assert len(validated) == 7 and best["step"] == min(validated, key=validated.get)
    assert best["progress"]["best"] == {"step": best["step"], "loss": min(validated.values())}


def test_a_worse_validation_does_not_replace_the_best(run, tmp_path, quick):
    rising = ["--schedule", "constant", "--warmup", 0, "--lr", 1e30, "--validate-every", 1]
    assert run("--steps", 1, *rising, "--run", "a")[0] == 0
    best = (tmp_path / "a/checkpoints/best.pt").read_bytes()
    assert run("--steps", 3, "--resume", "--run", "a", text=None)[0] == 0
    assert (tmp_path / "a/checkpoints/best.pt").read_bytes() == best


def test_a_run_of_its_own_by_default(run, tmp_path, quick):
    """Also within the same second."""
    for _ in range(3):
        assert run("--steps", 1)[0] == 0
    assert len(runs(tmp_path)) == 3


def test_two_processes_in_one_run_are_refused(run, tmp_path, quick):
    assert run("--steps", 1, "--run", "a")[0] == 0
    with RunFolder(tmp_path / "a").locked():
        status, _, err = run("--resume", "--run", "a", "--steps", 2)
    assert status == 2 and "in use by another process" in err
    assert run("--resume", "--run", "a", "--steps", 2)[0] == 0


def test_a_full_disk_leaves_the_old_checkpoint(run, tmp_path, monkeypatch, quick):
    assert run("--steps", 2)[0] == 0
    path = saved(tmp_path)
    before = path.read_bytes()

    def full(content, file):  # as torch.save does it: its archive cannot be closed any more
        file.write(b"half")
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 - nor does torch.save say from what

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        status, _, err = run("--steps", 3, "--resume")
    assert status == 2 and "No space left on device. Free some space, and continue with: " in err
    assert path.read_bytes() == before
    assert not [file.name for file in path.parent.iterdir() if file.name.endswith(".tmp")]
    assert run("--steps", 3, "--resume")[0] == 0  # the row of step 3 is written anew
    assert [row["step"] for row in rows(path.parents[1])] == ["1", "2", "2", "3", "3"]


def test_a_full_disk_while_logging_saves(run, tmp_path, monkeypatch, quick):
    """A row that cannot be written ends the run, but not without a checkpoint, if there is room for that."""
    from triton_lstm.training.metrics import Metrics

    log = Metrics.log

    def full(self, step, **values):
        if step == 3:
            raise OSError(28, "No space left on device")
        log(self, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "log", full)
        status, _, err = run("--steps", 5, "--run", "a")
    assert status == 2 and "No space left on device. Free some space, and continue with: " in err
    assert last(tmp_path / "a").name == "step_00000003.pt"
    assert run("--resume", "--run", "a", text=None)[0] == 0
    assert run("--steps", 5, "--run", "b")[0] == 0
    assert_same(last(tmp_path / "a"), last(tmp_path / "b"))


def test_a_process_that_went_on_meanwhile(run, tmp_path, monkeypatch, quick):
    """Between reading a checkpoint and locking the run: its steps are not repeated, nor their rows deleted."""
    from triton_lstm.training import corpus

    assert run("--steps", 2, "--run", "a")[0] == 0
    opened = corpus.open_corpus
    path = tmp_path / "a/checkpoints"

    def slow(data):
        (path / "step_00000004.pt").write_bytes((path / "step_00000002.pt").read_bytes())
        return opened(data)

    before = (tmp_path / "a/metrics.csv").read_bytes()
    monkeypatch.setattr(corpus, "open_corpus", slow)
    status, _, err = run("--resume", "--run", "a", "--steps", 3)
    assert status == 2 and "another process has gone on with a meanwhile. Start again" in err
    assert (tmp_path / "a/metrics.csv").read_bytes() == before


@pytest.mark.parametrize("steps", [9, 6], ids=["on the way", "at the end"])
def test_a_validation_that_a_signal_prevents_comes_later(steps, run, tmp_path, monkeypatch, quick):
    from triton_lstm.training import loop

    options = ["--steps", steps, "--validate-every", 3]
    assert run(*options, "--run", "whole")[0] == 0
    validate = loop.held_out_loss

    def interrupted(model, *rest):
        if len(losses(tmp_path / "parts")) == 6:
            signal.raise_signal(signal.SIGTERM)
        return validate(model, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "held_out_loss", interrupted)
        status, out, _ = run(*options, "--run", "parts")
    assert status == 130 and "stopped after step 6; continue with: " in out
    assert [row["step"] for row in rows(tmp_path / "parts") if row["validation_loss"]] == ["3"]
    status, out, _ = run("--resume", "--run", "parts", text=None)
    assert status == 0 and "held out: " in out
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert_same(last(tmp_path / "parts"), last(tmp_path / "whole"))
    assert run("--resume", "--run", "parts", text=None)[0] == 2  # nothing is left to do


def test_whatever_fails_between_steps_saves(run, tmp_path, monkeypatch, quick):
    from triton_lstm.training import loop

    def too_large(*args):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "held_out_loss", too_large)
        status, _, err = run("--steps", 5, "--validate-every", 4, "--run", "a")
    assert status == 2 and "continue with: " in err and err.endswith("or add --recompute.\n")
    assert last(tmp_path / "a").name == "step_00000004.pt"
    assert run("--resume", "--run", "a", "--recompute", text=None)[0] == 0
    assert run("--steps", 5, "--validate-every", 4, "--run", "b")[0] == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_a_run_without_a_checkpoint_begins_again(run, tmp_path, monkeypatch, quick):
    """As one that was killed early, and whose folder is there."""
    from triton_lstm.training.trainer import Trainer

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "prepare", fails)
        assert run("--steps", 2, "--run", "a")[0] == 2
    assert "start it without --resume" in run("--resume", "--run", "a")[2]
    assert run("--steps", 2, "--run", "a")[0] == 0 and len(losses(tmp_path / "a")) == 2


def test_a_best_model_that_cannot_be_saved_is_not_the_best(run, tmp_path, monkeypatch, quick):
    def full(self, step):
        if step == 2:
            raise UsageError("No space left on device")
        mark(self, step)

    mark = RunFolder.mark_best
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "mark_best", full)
        assert run("--steps", 3, "--validate-every", 1, "--lr", 0.1, "--warmup", 0, "--run", "a")[0] == 2
    best = tmp_path / "a/checkpoints/best.pt"
    assert torch.load(best, weights_only=True)["step"] == 1
    assert run("--resume", "--run", "a", text=None)[0] == 0
    content = torch.load(best, weights_only=True)
    assert content["step"] == content["progress"]["best"]["step"] > 1


def test_the_best_model_where_files_have_one_name_only(run, tmp_path, monkeypatch, quick):
    def refused(*args):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    assert run("--steps", 2, "--validate-every", 1, "--run", "a")[0] == 0
    assert torch.load(tmp_path / "a/checkpoints/best.pt", weights_only=True)["step"] == 2


def test_a_renamed_checkpoint_is_refused(run, tmp_path, quick):
    assert run("--steps", 2, "--run", "a")[0] == 0
    path = tmp_path / "a/checkpoints/step_00000002.pt"
    path.rename(path.with_name("step_00000009.pt"))
    status, _, err = run("--resume", "--run", "a", "--steps", 20)
    assert status == 2 and "step_00000009.pt was renamed: it is of step 2" in err


def test_paths_count_from_where_they_were_given(run, tmp_path, monkeypatch, quick):
    """Relative ones, and those of a home folder; a tokenizer may move like a text."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.train_from_iterator(["the quick brown fox"], tokenizers.trainers.BpeTrainer(show_progress=False))
    tokenizer.save(str(tmp_path / "tok.json"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("tokenizer: tok.json\ntext: [~/text.txt]\ncache: cache\n")
    assert run("--steps", 2, "--config", "own.yaml", "--run", "a", text=None)[0] == 0
    assert run("--steps", 3, "--config", "own.yaml", "--run", "a", "--resume", text=None)[0] == 0
    (tmp_path / "tok.json").rename(tmp_path / "moved.json")
    monkeypatch.chdir(tmp_path / "a")
    moved = ["--tokenizer", "../moved.json"]
    assert run("--steps", 4, "--run", ".", "--resume", *moved, text=None)[0] == 0
    tokenizer.add_tokens(["fox"])
    tokenizer.save(str(tmp_path / "moved.json"))
    status, _, err = run("--steps", 5, "--run", ".", "--resume", text=None)
    assert status == 2 and "was trained on another text" in err


def test_leftovers_of_killed_runs_are_removed(run, tmp_path, quick):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    assert run("--steps", 1, "--run", "a[1]")[0] == 0
    folder = tmp_path / "a[1]/checkpoints"
    for left in (ended.pid, os.getppid()):  # dead, and alive
        (folder / f"step_00000009.pt.{left}.tmp").touch()
    assert run("--steps", 2, "--resume", "--run", "a[1]")[0] == 0
    assert [path.name for path in folder.glob("*.tmp")] == [f"step_00000009.pt.{os.getppid()}.tmp"]


@pytest.mark.parametrize("steps", [3, 1], ids=["on the way", "at the end"])
def test_ctrl_c_during_a_save_is_deferred(steps, run, tmp_path, monkeypatch, quick):
    shipped = torch.save

    def interrupted(content, file):
        monkeypatch.setattr(torch, "save", shipped)
        signal.raise_signal(signal.SIGINT)
        shipped(content, file)

    monkeypatch.setattr(torch, "save", interrupted)
    status, out, _ = run("--steps", steps, "--save-every", 1)
    assert status == 130 and "stopped after step 1" in out and ("continue with" in out) == (steps == 3)
    assert last(runs(tmp_path)[0]).name == "step_00000001.pt"


def first_step(process) -> None:
    """Waits until the progress bar has counted a step."""
    while not re.search(rb" [1-9]\d*/\d", process.stderr.read1()):
        assert process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_saves_and_the_printed_command_resumes(number, train_process, run, tmp_path):
    """A real process and a real signal; with the same losses as an uninterrupted run."""
    constant = ["--schedule", "constant"]
    process = train_process("--steps", 100000, "--run", "a run's", *constant)
    first_step(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and b"Traceback" not in err
    done = len(losses(tmp_path / "a run's"))
    said, _, line = out.decode().splitlines()[-1].partition("; continue with: ")
    assert said == f"stopped after step {done}"
    python, *command = shlex.split(line)
    assert python == sys.executable and command == ["-m", "triton_lstm", "train", "--resume", "--run", "a run's"]
    assert run(*command[3:], "--steps", done + 2, text=None)[0] == 0
    assert run("--steps", done + 2, "--run", "whole", *constant)[0] == 0
    assert losses(tmp_path / "a run's") == losses(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_to_all_processes_saves(number, train_process, run, tmp_path, quick):
    """Workers too, as from a terminal or a scheduler."""
    process = train_process("--steps", 100000, "--run", "a", "--workers", 2, "--schedule", "constant", alone=True)
    first_step(process)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and b"Traceback" not in err, err
    done = len(losses(tmp_path / "a"))
    assert f"stopped after step {done}; continue with: " in out.decode()
    assert run("--resume", "--run", "a", "--steps", done + 2, "--workers", 0, text=None)[0] == 0
    assert run("--steps", done + 2, "--run", "whole", "--schedule", "constant")[0] == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "whole")


def test_a_worker_that_dies_ends_the_run(train_process, tmp_path, quick):
    process = train_process("--steps", 100000, "--run", "a", "--workers", 2, "--save-every", 1)
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
    assert run(*options, "--run", "whole")[0] == 0
    more = ["--save-every", 1, "--keep", 2, "--run", "killed"]
    started, kills = [*options, *more], 0
    for k in range(12):
        process = train_process(*started)
        first_step(process)
        time.sleep(0.02 * k)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        started = ["--resume", "--run", "killed"]
        checkpoints = RunFolder(tmp_path / "killed").steps()
        assert checkpoints and len(checkpoints) <= 3
        if checkpoints[-1].name == "step_00000500.pt":
            break
    assert kills >= 3
    if checkpoints[-1].name != "step_00000500.pt":
        assert run("--resume", "--run", "killed", text=None)[0] == 0
    found, expected = rows(tmp_path / "killed"), rows(tmp_path / "whole")
    assert found == expected
    assert_same(last(tmp_path / "killed"), last(tmp_path / "whole"))
    assert not [path for path in (tmp_path / "killed").rglob("*.tmp") if path.parent.name == "checkpoints"]


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
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and err == b""


def test_the_folder_says_where_it_came_from(run, tmp_path, quick):
    """config.yaml, given to --config, makes the same run; about.yaml has versions and the git commit."""
    import yaml

    options = ["--steps", 3, "--dropout", 0.25, "--clip", "off", "--betas", 0.7, 0.9]
    assert run(*options, "--run", "a")[0] == 0
    about = yaml.safe_load((tmp_path / "a/about.yaml").read_text())
    assert about["torch"] == torch.__version__ and about["commit"] and about["python"]
    again = subprocess.run(
        [sys.executable, "-m", "triton_lstm", "train", "--config", "a/config.yaml", "--run", "b"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
    )
    assert again.returncode == 0, again.stderr
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    configs = [yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in "ab"]
    assert run("--resume", "--steps", 4, "--run", "a", text=None)[0] == 0
    resumed = yaml.safe_load((tmp_path / "a/about.yaml").read_text())
    assert resumed.items() >= about.items() and resumed["resumed"][0].keys() == about.keys()
    assert configs[0] == configs[1] and configs[0]["clip"] == "off"
