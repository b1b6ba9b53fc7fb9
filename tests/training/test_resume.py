"""Runs that go on: the same losses, bit for bit; and what is refused."""

import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("pydantic", reason="the configuration needs pydantic")
pytest.importorskip("cyclopts", reason="the options of `train` need cyclopts")
import torch
from training import assert_same, content, last, losses, read, rows, runs, saved

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
    assert run(*whole, "--folder", "whole")[0] == 0
    assert run(*whole, "--folder", "parts", "--save-every", 5, "--keep", 9)[0] == 0
    shutil.rmtree(tmp_path / "parts/checkpoints/step_00000008")
    assert run("--resume", "--folder", "parts", text=None)[0] == 0
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert_same(last(tmp_path / "parts"), last(tmp_path / "whole"))


def test_the_same_losses_with_the_kernels(run, tmp_path):
    assert run("--steps", 6, "--folder", "whole")[0] == 0
    assert run("--steps", 6, "--folder", "parts", "--save-every", 3, "--keep", 9)[0] == 0
    shutil.rmtree(tmp_path / "parts/checkpoints/step_00000006")
    assert run("--resume", "--folder", "parts", text=None)[0] == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_more_steps(run, tmp_path, quick):
    """With a constant rate a longer run has the same losses; the newest run is the one that goes on."""
    constant = ["--schedule", "constant"]
    assert run("--steps", 8, *constant, "--folder", "whole")[0] == 0
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
    assert run("--steps", 2, "--betas", 0.8, 0.95)[0] == 0
    before = content(saved(tmp_path))
    status, out, err = run("--resume", "--steps", 3, *options)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert content(saved(tmp_path)) == before and out == ""


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
    names = {path.name for path in (run_folder / "checkpoints").iterdir()}
    validated = {int(row["step"]): float(row["validation_loss"]) for row in rows(run_folder) if row["validation_loss"]}
    best, _ = read(run_folder / "checkpoints/best")
    assert len(validated) == 7 and best["step"] == min(validated, key=validated.get)
    assert names == {"best", f"step_{best['step']:08}", "step_00000006", "step_00000007"}
    assert best["progress"]["best"] == {"step": best["step"], "loss": min(validated.values())}


def test_a_worse_validation_does_not_replace_the_best(run, tmp_path, quick):
    rising = ["--schedule", "constant", "--warmup", 0, "--lr", 1e30, "--validate-every", 1]
    assert run("--steps", 1, *rising, "--folder", "a")[0] == 0
    best = content(tmp_path / "a/checkpoints/best")
    assert run("--steps", 3, "--resume", "--folder", "a", text=None)[0] == 0
    assert content(tmp_path / "a/checkpoints/best") == best


def test_a_run_of_its_own_by_default(run, tmp_path, quick):
    """Also within the same second."""
    for _ in range(3):
        assert run("--steps", 1)[0] == 0
    assert len(runs(tmp_path)) == 3


def test_paths_count_from_where_they_were_given(run, tmp_path, monkeypatch, quick):
    """Relative ones, and those of a home folder; a tokenizer may move like a text."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.train_from_iterator(["the quick brown fox"], tokenizers.trainers.BpeTrainer(show_progress=False))
    tokenizer.save(str(tmp_path / "tok.json"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("tokenizer: tok.json\ntext: [~/text.txt]\ncache: cache\n")
    assert run("--steps", 2, "--config", "own.yaml", "--folder", "a", text=None)[0] == 0
    assert run("--steps", 3, "--config", "own.yaml", "--folder", "a", "--resume", text=None)[0] == 0
    (tmp_path / "tok.json").rename(tmp_path / "moved.json")
    monkeypatch.chdir(tmp_path / "a")
    moved = ["--tokenizer", "../moved.json"]
    assert run("--steps", 4, "--folder", ".", "--resume", *moved, text=None)[0] == 0
    tokenizer.add_tokens(["fox"])
    tokenizer.save(str(tmp_path / "moved.json"))
    status, _, err = run("--steps", 5, "--folder", ".", "--resume", text=None)
    assert status == 2 and "was trained on another text" in err


def test_a_resumed_run_has_the_kernels_where_no_variable_is_set(run, interpreter, tmp_path):
    assert run("--steps", 1, "--folder", "a")[0] == 0
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "triton_lstm", "train", "--resume", "--folder", "a", "--steps", "2"]
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "Triton kernels in Triton's interpreter" in again.stdout + again.stderr, again


def test_the_folder_says_where_it_came_from(run, tmp_path, quick):
    """config.yaml, given to --config, makes the same run; about.yaml has versions and the git commit."""
    import yaml

    options = ["--steps", 3, "--dropout", 0.25, "--clip", "off", "--betas", 0.7, 0.9]
    assert run(*options, "--folder", "a")[0] == 0
    about = yaml.safe_load((tmp_path / "a/about.yaml").read_text())
    assert about["torch"] == torch.__version__ and about["commit"] and about["python"]
    again = subprocess.run(
        [sys.executable, "-m", "triton_lstm", "train", "--config", "a/config.yaml", "--folder", "b"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
    )
    assert again.returncode == 0, again.stderr
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    configs = [yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in "ab"]
    assert run("--resume", "--steps", 4, "--folder", "a", text=None)[0] == 0
    resumed = yaml.safe_load((tmp_path / "a/about.yaml").read_text())
    assert resumed.items() >= about.items() and resumed["resumed"][0].keys() == about.keys()
    assert configs[0] == configs[1] and configs[0]["clip"] == "off"


def test_a_repeated_command_that_was_killed_as_it_began(run, quick, tmp_path):
    """What it leaves before config.yaml is no run yet, for itself alone; anything else in the folder is kept."""
    (tmp_path / "a/checkpoints").mkdir(parents=True)
    (tmp_path / "a/about.yaml.1.tmp").touch()
    command = ["--steps", 1, "--folder", "a"]
    assert "a exists" in run(*command)[2]
    (tmp_path / "a/notes").touch()
    assert "a exists" in run(*command, "--resume-or-start")[2]
    (tmp_path / "a/notes").unlink()
    assert run(*command, "--resume-or-start")[0] == 0
