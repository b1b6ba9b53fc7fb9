"""Processes that die, hang, or are told to end: nothing is lost, and nobody waits for ever."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("pydantic", reason="the configuration needs pydantic")
pytest.importorskip("cyclopts", reason="the options of `train` need cyclopts")
pytest.importorskip("safetensors", reason="checkpoints need safetensors")
import torch
from child import python_path
from ranks import free_port, workers
from training import TINY, assert_same, last, losses, rows

from triton_lstm.training.run_folder import RunFolder

STEPS = 300


def saved_after(folder, step, process):
    """Waits for a checkpoint of a later step."""
    while not any(int(path.name.removeprefix("step_")) > step for path in RunFolder(folder).steps()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def undisturbed(ranks, tmp_path, *options):
    assert all(result.status == 0 for result in ranks(2, *options, "--folder", "whole"))
    return tmp_path / "whole"


def assert_same_runs(a, b):
    assert rows(a) == rows(b)
    assert_same(last(a), last(b))


@pytest.mark.parametrize("strategy, killed", [("ddp", 0), ("fsdp", 1)])
def test_torchrun_restarts_what_was_killed(strategy, killed, torchrun, ranks, tmp_path):
    """A rank at a random moment; the run ends as if nothing had happened."""
    options = ["--steps", STEPS, "--strategy", strategy, "--log-every", 7, "--validate-every", 90]
    whole = undisturbed(ranks, tmp_path, *options)
    process = torchrun(2, *options, "--folder", "killed", "--save-every", 10, restarts=3)
    saved_after(tmp_path / "killed", 0, process)
    time.sleep(random.random())
    os.kill(workers(process)[killed], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()
    assert re.search(rb"resuming killed from step \d+0\n", out)
    assert_same_runs(tmp_path / "killed", whole)


def test_all_killed_during_a_save(torchrun, ranks, tmp_path):
    """Again and again, with torchrun itself, while every step is saved."""
    options = ["--steps", 60, "--log-every", 3]
    whole = undisturbed(ranks, tmp_path, *options)
    for kills in range(3):
        process = torchrun(2, *options, "--folder", "killed", "--save-every", 1, "--keep", 2, "--resume-or-start")
        saved_after(tmp_path / "killed", 12 * kills, process)
        for pid in [process.pid, *workers(process)]:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
    assert 1 <= len(RunFolder(tmp_path / "killed").steps()) <= 3
    assert all(result.status == 0 for result in ranks(2, "--resume", "--folder", "killed"))
    assert_same_runs(tmp_path / "killed", whole)
    assert not list((tmp_path / "killed/checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("told", ["torchrun", "one rank"])
def test_sigterm_saves_and_ends(told, torchrun, ranks, tmp_path):
    """As from a scheduler, before it takes the machine away."""
    options = ["--schedule", "constant", "--folder", "a"]
    process = torchrun(2, "--steps", 10**6, "--save-every", 10**6, *options)
    metrics = tmp_path / "a/metrics.csv"
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid if told == "torchrun" else workers(process)[1], signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    done = len(losses(tmp_path / "a"))
    command = "torchrun --nproc-per-node 2 -m triton_lstm train --resume --folder a"
    assert f"stopped after step {done}; continue with: {command}\n" in out.decode(), err.decode()
    assert process.returncode != 0
    assert all(result.status == 0 for result in ranks(2, "--steps", done + 2, "--resume", "--folder", "a"))
    whole = undisturbed(ranks, tmp_path, "--steps", done + 2, "--schedule", "constant")
    assert losses(tmp_path / "a") == losses(whole)


@pytest.fixture
def store():
    """Where two ranks meet that torchrun has not started."""
    return torch.distributed.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)


@pytest.fixture
def two(store, text, tmp_path):
    """Starts both ranks, or the first one; nobody kills one because the other has ended."""
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    common["PYTHONPATH"] = python_path()
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TRITON_LSTM_BACKEND": "torch", "OMP_NUM_THREADS": "1"}
    started = []

    def start(*programs):
        options = ["--steps", "1000000", "--timeout", "5", "--folder", "a", "--device", "cpu", "--text", str(text)]
        for rank, program in enumerate(programs):
            command = [sys.executable, *program, "train", *TINY, *options]
            environment = common | {"RANK": str(rank)}
            started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE))
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_hangs_is_named(stopped, two, tmp_path):
    """The others end after the time limit."""
    processes = two(["-m", "triton_lstm"], ["-m", "triton_lstm"])
    metrics = tmp_path / "a/metrics.csv"
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 4:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[stopped].send_signal(signal.SIGSTOP)
    _, err = processes[1 - stopped].communicate(timeout=300)
    assert processes[1 - stopped].returncode == 2
    last_line = err.decode().splitlines()[-1]
    assert re.search(rf"rank {stopped} did not respond for the --timeout, while rank \d was at step \d+\. ", last_line)
    assert "Start again" in last_line and "Traceback" not in err.decode()


DIES = """
import os, sys
from triton_lstm.cli.main import main
from triton_lstm.training.{module} import {owner}
{owner}.{function} = lambda *args: os._exit(3)
main(sys.argv[1:])
"""
DEATHS = {
    "text": ("text.corpus", "Corpus", "split"),
    "model": ("trainer", "Trainer", "__init__"),
    "the first step": ("trainer", "Trainer", "prepare"),
}


@pytest.mark.parametrize("module, owner, function", DEATHS.values(), ids=DEATHS)
def test_a_rank_that_dies_at_the_start(module, owner, function, two):
    """The other one ends, too, and says why in one line."""
    dies = ["-c", DIES.format(module=module, owner=owner, function=function)]
    survivor, _ = two(["-m", "triton_lstm"], dies)
    _, err = survivor.communicate(timeout=300)
    assert survivor.returncode == 2, err.decode()
    message = "triton-lstm train: another process of this run has ended. Start again."
    assert err.decode().splitlines()[-1] == message and "Traceback" not in err.decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_others_have_not_started(number, store, two):
    """The process waits outside of Python, for minutes."""
    before = store.num_keys()
    (waiting,) = two(["-m", "triton_lstm"])
    while store.num_keys() == before:
        assert waiting.poll() is None
        time.sleep(0.05)
    waiting.send_signal(number)
    assert waiting.wait(100) == -number


def test_a_rank_that_cannot_be(run, monkeypatch):
    for name, value in {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    status, out, err = run("--steps", 1)
    message = "cannot join the other processes (RANK is 2, WORLD_SIZE 2). Start all of them with torchrun"
    assert (status, out) == (2, "") and message in err


def test_a_batch_that_cannot_be_divided_between_those_that_go_on(ranks):
    """It cannot be changed any more."""
    assert all(result.status == 0 for result in ranks(2, "--steps", 1, "--folder", "a"))
    found = ranks(3, "--resume", "--folder", "a", "--steps", 2)
    assert [result.status for result in found] == [2, 2, 2]
    assert "--batch 4 cannot be divided between 3 processes. Start another number of them" in found[0].err


def test_a_checkpoint_without_a_shard(ranks, tmp_path):
    """One from the middle, without which all sizes are right; so would be the list of files."""
    options = ["--batch", 6, "--strategy", "fsdp", "--folder", "a"]
    assert all(result.status == 0 for result in ranks(3, "--steps", 1, *options))
    state = last(tmp_path / "a") / "state.json"
    content = json.loads(state.read_text())
    name = sorted(content["files"])[1]
    (state.parent / name).unlink()
    del content["files"][name]
    state.write_text(json.dumps(content))
    found = ranks(3, "--resume", "--steps", 2, "--folder", "a")
    assert [result.status for result in found] == [2, 2, 2]
    assert "is damaged: a part of a tensor is missing. Start over without --resume" in found[0].err
