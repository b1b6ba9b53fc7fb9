"""The commands tune and doctor. Off a GPU the measuring is a stand-in; test_tune.py has the real one."""

import dataclasses
import os
import subprocess
import sys

import pytest

pytest.importorskip("pandas")
import torch
from tuned import BACKWARD, FORWARD

from triton_lstm.cli import main as cli
from triton_lstm.cli import tune as tune_commands
from triton_lstm.cli.tune_report import print_trials
from triton_lstm.kernels.configs import Trial
from triton_lstm.perf.failures import DeviceLostError
from triton_lstm.perf.step.machine_code import why_no_tools
from triton_lstm.planning.devices import GPUS, file_name
from triton_lstm.planning.space import make_plan
from triton_lstm.tuning import measure as tune
from triton_lstm.tuning.table_file import Key, LayerTime, TableError, read

H200 = GPUS["H200"]
SHAPE = ["--hidden", "24,40", "--batch", "3", "--dtype", "bf16"]
KEYS = [Key(backward, "bf16", H, 16) for H in (24, 40) for backward in (False, True)]


@pytest.fixture
def run(capsys, monkeypatch):
    def call(*args):
        try:
            status = cli.main(list(args))
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def measured(monkeypatch, tables_folder):
    """A GPU by name, and measurements made up: half of what is planned for each config of 8 units."""
    keys = []

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def measure(key, device, begin, again):
        keys.append(key)
        plan = make_plan(key.on(H200))
        others = [dataclasses.replace(plan, block_h=h, exchange="flag") for h in (8, 16)]
        begin(plan)
        return [
            Trial(plan, 1.0, 2.0),
            Trial(others[0], 1.1, 0.8),
            Trial(others[1], 1.2, reason="it fell over", failed=True),
            Trial(others[1], 9.0, reason="not tried"),
        ]

    def layer_times(dtype, H, B, device):
        return [LayerTime(mode, dtype, H, B, 4.0, 6.0) for mode in ("inference", "training")]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: H200.name)
    monkeypatch.setattr("triton_lstm.kernels.device_facts", lambda device: H200)
    monkeypatch.setattr("triton_lstm.perf.failures.device_still_there", lambda device: None)
    monkeypatch.setattr("triton_lstm.perf.warm.compile_all", lambda jobs: None)
    monkeypatch.setattr("triton_lstm.system.machine.provenance", lambda: "torch 2, today")
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr("triton_lstm.perf.layer_times.layer_times", layer_times)
    return keys


def test_it_writes_a_table_and_shows_the_gain(run, measured, tmp_path):
    status, out, _ = run("tune", *SHAPE)
    path = tmp_path / file_name(H200.name)
    assert status == 0 and measured == KEYS
    found = read(path)
    assert set(found.plans) == set(KEYS) and all(entry.plan.block_h == 8 for entry in found.plans.values())
    assert found.about["gpu"] == H200.name and len(found.layers) == 4
    assert {"gain", "2.5", "1.5"} <= set(out.split()) and f"table: {path}" in out
    assert not path.with_suffix(".json.running").exists()


def test_kernels_are_compiled_ahead(run, measured, monkeypatch):
    """Side by side, before the first is measured; not where there are few."""
    ahead = []
    monkeypatch.setattr("triton_lstm.perf.warm.compile_all", lambda jobs: ahead.append((list(jobs), list(measured))))
    run("tune", *SHAPE)
    assert ahead == [([str(key) for key in KEYS], [])]
    run("tune", *SHAPE, "--hidden", "24", "--again")
    assert len(ahead) == 1


def test_the_same_command_continues(run, measured, tmp_path, monkeypatch):
    shipped = tune.measure

    def interrupted(key, *args, **kwargs):
        if len(measured) == 1:
            raise KeyboardInterrupt
        return shipped(key, *args, **kwargs)

    monkeypatch.setattr(tune, "measure", interrupted)
    status, out, _ = run("tune", *SHAPE)
    assert status == 130 and "interrupted; the same command continues" in out
    assert list(read(tmp_path / file_name(H200.name)).plans) == KEYS[:1]
    monkeypatch.setattr(tune, "measure", shipped)
    assert run("tune", *SHAPE)[0] == 0
    assert measured == KEYS
    assert run("tune", *SHAPE)[0] == 0 and measured == KEYS  # nothing is left
    assert run("tune", *SHAPE, "--again")[0] == 0 and measured == KEYS + KEYS


def test_what_is_done_counts_while_its_table_is_there(run, measured, tmp_path, monkeypatch):
    times = iter([0.0, 10.0, 20.0, 400.0])
    monkeypatch.setattr(tune_commands.time, "monotonic", lambda: next(times, 0.0))
    run("tune", *SHAPE, "--budget", "5m")
    assert measured == KEYS[:2]
    (tmp_path / file_name(H200.name)).unlink()  # the note of what is done stays
    assert run("tune", *SHAPE)[0] == 0
    assert measured == KEYS[:2] + KEYS and set(read(tmp_path / file_name(H200.name)).plans) == set(KEYS)


def test_the_budget_lets_nothing_new_begin(run, measured, monkeypatch):
    times = iter([0.0, 10.0, 400.0])
    monkeypatch.setattr(tune_commands.time, "monotonic", lambda: next(times))
    status, out, _ = run("tune", *SHAPE, "--budget", "5m")
    assert status == 0 and len(measured) == 1 and "the budget is spent; the same command continues" in out


def test_verbose_shows_every_config_and_its_reason(run, measured):
    _, out, _ = run("tune", *SHAPE, "--verbose")
    assert "it fell over" in out and "not tried" in out and "bf16 H=24 B=16 forward" in out


def test_what_failed_is_always_named(run, measured):
    _, out, _ = run("tune", *SHAPE)
    assert "it fell over" in out and "not tried" not in out


@pytest.mark.parametrize("error", [RuntimeError("a CUDA error"), torch.OutOfMemoryError("too much"), ValueError("no")])
def test_a_shape_that_fails_is_named_and_the_others_go_on(error, run, measured, monkeypatch):
    shipped = tune.measure

    def failing(key, *args, **kwargs):
        if key == KEYS[1]:
            raise error
        return shipped(key, *args, **kwargs)

    monkeypatch.setattr(tune, "measure", failing)
    status, out, _ = run("tune", *SHAPE)
    assert status == 1 and len(measured) == 3 and str(error) in out


def test_where_not_even_the_plan_runs_the_reason_is_shown(run, measured, monkeypatch):
    plan = make_plan(FORWARD.on(H200))
    monkeypatch.setattr(tune, "measure", lambda *_, **__: [Trial(plan, 1.0, reason="no kernel image")])
    status, out, _ = run("tune", *SHAPE)
    assert status == 1 and "no kernel image" in out


def test_a_lost_gpu_is_left_to_a_fresh_process(run, measured, monkeypatch, capsys):
    """Which knows what killed this one, and what was done; `--again` does not begin anew."""
    shipped, started = tune.measure, []

    def lost(key, *args, begin, **kwargs):
        if key == KEYS[1]:
            begin(make_plan(BACKWARD.on(H200)))
            raise RuntimeError("an illegal memory access was encountered")
        return shipped(key, *args, begin=begin, **kwargs)

    def gone(device):
        raise DeviceLostError("an illegal memory access")

    def execv(program, command):
        started.append(command)
        raise SystemExit(77)

    monkeypatch.setattr(tune, "measure", lost)
    monkeypatch.setattr("triton_lstm.perf.failures.device_still_there", gone)
    monkeypatch.setattr(os, "execv", execv)
    argv = ["tune", *SHAPE, "--again"]
    monkeypatch.setattr(sys, "argv", ["triton-lstm", *argv])
    with pytest.raises(SystemExit, match="77"):
        cli.main()
    assert "continuing in a fresh one" in capsys.readouterr().err
    assert started == [[sys.executable, "-m", "triton_lstm", *argv]]

    refused = []

    def measure(key, *args, begin, **kwargs):
        if key == KEYS[1]:
            refused.append(begin(make_plan(BACKWARD.on(H200))))
        return shipped(key, *args, begin=begin, **kwargs)

    monkeypatch.setattr(tune, "measure", measure)
    assert run("tune", *SHAPE, "--again")[0] == 0
    assert refused == ["the process died while measuring it"] and measured == KEYS


def test_a_lost_gpu_replaces_nobody_elses_process(run, measured, monkeypatch):
    def lost(*args, **kwargs):
        raise DeviceLostError("an illegal memory access")

    monkeypatch.setattr(tune, "measure", lost)
    monkeypatch.setattr(os, "execv", lambda *command: pytest.fail("pytest would be gone"))
    status, _, err = run("tune", *SHAPE)
    assert status == 2 and "The same command in a fresh process resumes from here" in err


def test_a_full_disk_is_no_configs_fault(run, measured, monkeypatch):
    shipped = tune_commands.update

    def full(path, gpu, *entries):
        if entries:
            raise OSError(28, "No space left on device")
        shipped(path, gpu)

    monkeypatch.setattr(tune_commands, "update", full)
    status, _, err = run("tune", *SHAPE)
    assert status == 2 and "No space left on device" in err
    refused = []
    measure = tune.measure

    def looking(key, *args, begin, **kwargs):
        refused.append(begin(make_plan(key.on(H200))))
        return measure(key, *args, begin=begin, **kwargs)

    monkeypatch.setattr(tune_commands, "update", shipped)
    monkeypatch.setattr(tune, "measure", looking)
    assert run("tune", *SHAPE)[0] == 0 and refused == [None] * 4


def test_another_commands_failures_are_not_this_ones(run, measured, monkeypatch):
    shipped = tune.measure

    def failing(key, *args, **kwargs):
        if key.H == 40:
            raise KeyboardInterrupt
        raise RuntimeError("of 24")

    monkeypatch.setattr(tune, "measure", failing)
    assert run("tune", *SHAPE)[0] == 130
    monkeypatch.setattr(tune, "measure", shipped)
    status, out, _ = run("tune", "--hidden", "40", "--batch", "16", "--dtype", "bf16")
    assert status == 0 and "of 24" not in out


def test_interpreted_times_are_nobodys(run, measured, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    status, _, err = run("tune", *SHAPE)
    assert status == 2 and "TRITON_INTERPRET=1 keeps the kernels off the GPU" in err and not measured


@pytest.mark.parametrize("text", ["", "[]", '{"died": 3}', "\x00"])
def test_a_damaged_note_of_a_dead_run_stops_nothing(text, run, measured, tmp_path):
    (tmp_path / file_name(H200.name)).with_suffix(".json.running").write_text(text)
    assert run("tune", *SHAPE)[0] == 0


@pytest.mark.parametrize(
    "args, says",
    [
        (["--hidden", "0"], "whole numbers from 1"),
        (["--hidden", "a"], "whole numbers from 1"),
        (["--hidden", "²"], "whole numbers from 1"),
        (["--batch", "16,,64"], "whole numbers from 1"),
        (["--dtype", "int8"], "There are bf16, fp16, tf32, fp32"),
        (["--budget", "soon"], "a time such as 300s"),
        (["--budget", "0s"], "a time such as 300s"),
        (["--budget", ""], "a time such as 300s"),
        (["--budget", "9" * 400 + "s"], "a time such as 300s"),
        (["--hidden", "9" * 5000], "whole numbers from 1"),
        (["--dry-run", "--gpu", "H200", "--again"], "--dry-run measures and writes nothing"),
        (["--dry-run", "--gpu", "MI300X", "--dtype", "tf32"], "has no tf32"),
        (["--gpu", "Z80"], "There are A100"),
        (["--gpu", "H200"], "--gpu is for --dry-run"),
        (["--model"], "--model is for --dry-run"),
    ],
    ids=lambda value: "",
)
def test_bad_input(args, says, run):
    status, _, err = run("tune", *args)
    assert status == 2 and says in err and "Traceback" not in err


def test_a_file_that_is_no_table_is_left_alone(run, measured, tmp_path):
    path = tmp_path / "notes.json"
    path.write_text("mine")
    status, _, err = run("tune", *SHAPE, "--out", str(path))
    assert status == 2 and "Give another file with --out" in err and path.read_text() == "mine"


def test_a_place_that_cannot_be_written(run, measured, tmp_path):
    (tmp_path / "file").touch()
    status, _, err = run("tune", *SHAPE, "--out", str(tmp_path / "file" / "table.json"))
    assert status == 2 and "Traceback" not in err


def test_a_folder_is_no_table(run, measured, tmp_path):
    status, _, err = run("tune", *SHAPE, "--out", str(tmp_path))
    assert status == 2 and "is a folder. Name a file" in err


NO_PLACES = [(None, "no cache folder is known"), (TableError("no such user"), "no such user")]


@pytest.mark.parametrize("folder, says", NO_PLACES, ids=["none", "not readable"])
def test_no_place_for_the_table(folder, says, run, measured, monkeypatch):
    def user_folder():
        if folder is None:
            return None
        raise folder

    monkeypatch.setattr(tune_commands, "user_folder", user_folder)
    status, _, err = run("tune", *SHAPE)
    assert status == 2 and says in err and "Traceback" not in err


def test_verbose_shows_how_well_the_order_was_predicted(capsys):
    plan = make_plan(KEYS[0].on(H200))
    trials = [Trial(dataclasses.replace(plan, warps=w), us, 2 * us) for w, us in ((1, 1.0), (2, 2.0), (4, 3.0))]
    print_trials("forward", trials, every=True)
    assert "rank correlation 1.00 over 3 configs" in capsys.readouterr().out


def test_two_tunes_do_not_fill_one_table(run, measured, tmp_path):
    import filelock

    path = tmp_path / file_name(H200.name)
    with filelock.FileLock(f"{path}.tuning.lock"):
        status, _, err = run("tune", *SHAPE)
    assert status == 2 and "another tune is filling" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(run):
    status, _, err = run("tune")
    assert status == 2 and "nothing was measured" in err and "--dry-run --gpu" in err
    status, _, err = run("tune", "--dry-run")
    assert status == 2 and "Name one with --gpu" in err


@pytest.mark.parametrize("gpu", list(GPUS))
def test_dry_run(gpu, run):
    status, out, _ = run(
        "tune", "--dry-run", "--gpu", gpu, "--hidden", "64,768", "--batch", "16", "--dtype", "bf16,fp32"
    )
    assert status == 0 and GPUS[gpu].name in out and "not measured" in out
    assert out.count("us a step") == 8


@pytest.mark.parametrize("gpu, why", [("H200", "TRITON_INTERPRET set"), ("MI300X", "no model of gfx942")])
def test_dry_run_says_why_nothing_is_modelled(gpu, why, run, interpreter):
    status, out, _ = run("tune", "--dry-run", "--gpu", gpu, "--hidden", "64", "--batch", "16", "--model")
    assert status == 0 and out.count("not: ") == out.count(why) == 2


@pytest.mark.skipif(why_no_tools() is not None, reason=str(why_no_tools()))
def test_dry_run_models_compiled_kernels():
    command = ["tune", "--dry-run", "--gpu", "H200", "--hidden", "256", "--batch", "16", "--model"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, "-m", "triton_lstm", *command], env=environment, capture_output=True, text=True, check=True
    )
    assert "modelled us/step" in done.stdout and done.stdout.count("with every row there") == 2


def test_dry_run_shows_why_configs_are_dropped(run):
    _, out, _ = run("tune", "--dry-run", "--gpu", "L4", "--hidden", "1024", "--batch", "16", "--verbose")
    for reason in ("KiB of shared memory", "spill registers", "wait for each other"):
        assert reason in out
    _, out, _ = run("tune", "--dry-run", "--gpu", "MI300X", "--hidden", "256", "--batch", "16", "--verbose")
    assert "volatile loads" in out
