"""What a run shows besides its output: metrics.csv, TensorBoard, Weights & Biases."""

import math

import pytest

pytest.importorskip("pydantic", reason="the configuration needs pydantic")
pytest.importorskip("cyclopts", reason="the options of `train` need cyclopts")
from training import losses, rows, runs

from triton_lstm.cli import main as cli

WATCHED = ["--steps", 5, "--validate-every", 2, "--save-every", 3, "--gradients-every", 2]


def test_rows_of_metrics(run, tmp_path, quick):
    """A row has the mean of the losses since the last one."""
    rate = ["--lr", 0.015, "--warmup", 64]
    assert run("--steps", 7, *rate, "--folder", "each")[0] == 0
    assert run("--steps", 7, *rate, "--log-every", 3, "--validate-every", 4, "--folder", "some")[0] == 0
    each, some = losses(tmp_path / "each"), rows(tmp_path / "some")
    assert [row["step"] for row in some] == ["3", "4", "6", "7", "7"]
    logged = [float(row["loss"]) for row in some if row["loss"]]
    for mean, part in zip(logged, (each[:3], each[3:6], each[6:]), strict=True):
        assert math.isclose(mean, sum(part) / len(part), rel_tol=1e-12)
    assert [bool(row["validation_loss"]) for row in some] == [False, True, False, False, True]
    assert [row["tokens"] for row in some] == ["60", "", "120", "140", ""]
    assert float(some[0]["lr"]) == 0.015 * 3 / 64


def test_tensorboard(run, tmp_path):
    """Scalars, samples, and the gradients of all layers and time steps; a resumed run goes on in the same place."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(*WATCHED, "--tensorboard", "--folder", "a")[0] == 0
    assert run("--resume", "--steps", 6, "--folder", "a")[0] == 0
    found = events.EventAccumulator(str(tmp_path / "a/tensorboard"), size_guidance={"images": 0}).Reload()
    tags = found.Tags()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in found.Scalars("validation_loss")] == [2, 4, 5, 6]
    for layer in range(2):
        norms = found.Scalars(f"gradients/lstm/layer{layer}_forward/norm/hidden")
        assert [event.step for event in norms] == [2, 4, 6] and all(event.value > 0 for event in norms)
    assert [event.step for event in found.Images("gradients")] == [2, 4, 6]
    assert any(tag.startswith("sample") for tag in tags["tensors"])
    whole = [row for row in rows(tmp_path / "a") if row["loss"]]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx([float(row["loss"]) for row in whole])


def test_weights_and_biases(run, tmp_path, monkeypatch, quick):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    status, _, err = run(*WATCHED, "--wandb", "a project", "--folder", "a")
    assert status == 0 and "failed" not in err
    assert list((tmp_path / "a/wandb").glob("offline-run-*/*.wandb"))


def test_watching_changes_nothing(run, tmp_path, quick):
    assert run("--steps", 5, "--folder", "plain")[0] == 0
    assert run(*WATCHED, "--tensorboard", "--folder", "watched")[0] == 0
    assert losses(tmp_path / "plain") == losses(tmp_path / "watched")


def test_runs_lists_what_train_made(run, tmp_path, quick, capsys):
    assert run("--steps", 2, "--folder", "runs/a")[0] == 0
    assert run("--steps", 2, "--hidden", 16, "--folder", "runs/b")[0] == 0
    assert len(runs(tmp_path)) == 2
    assert cli.main(["runs"]) == 0
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert "hidden" in header and "lr" not in header.split() and [line.split()[0] for line in lines] == ["a", "b"]
    assert run("--resume", "--steps", 3, "--folder", "runs/b", text=None)[0] == 0
    assert cli.main(["runs", "runs/b", "--plot", "out.png"]) == 0
    out = capsys.readouterr().out
    (resumed,) = (line for line in out.splitlines() if line.startswith("resumed "))
    assert resumed.split()[1].startswith("20") and len(resumed.split()) == 2
    assert "best" in out and "step_00000002" in out and (tmp_path / "out.png").stat().st_size > 1000
