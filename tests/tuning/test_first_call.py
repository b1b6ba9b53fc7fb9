"""TRITON_LSTM_AUTOTUNE=1: a first call tunes its config. `wants_tuning`, which asks for a GPU, is in test_policy.py."""

import dataclasses
import threading
from types import SimpleNamespace

import pytest
import torch
from tuned import FORWARD, H200, Clock

from triton_lstm.kernels.configs import Trial
from triton_lstm.planning.devices import file_name
from triton_lstm.planning.space import make_plan
from triton_lstm.tuning import first_call, tables
from triton_lstm.tuning.table_file import read

CPU = torch.device("cpu")


@pytest.fixture
def first_calls(as_on_a_gpu, monkeypatch):
    """The clock, and the keys that were measured."""
    clock, measured, measure = Clock(lambda plan: 0.1 if plan.block_h == 8 else 1.0), [], first_call.measure

    def measure_now(key, device):
        measured.append(key)
        return measure(key, device, clock=clock, steps=4, begin=clock.begin)

    monkeypatch.setattr(first_call, "wants_tuning", lambda device: True)
    monkeypatch.setattr(first_call, "measure", measure_now)
    return SimpleNamespace(clock=clock, measured=measured)


def test_it_tunes_once_and_is_remembered(first_calls, tmp_path):
    for batch in (16, 9):  # of one bucket
        plan = first_call.choice_for(torch.bfloat16, CPU, batch, 24, False).plan
        assert plan.block_h == 8
    assert first_calls.measured == [FORWARD]
    assert read(tmp_path / file_name(H200.name)).plans[FORWARD].plan.block_h == 8
    first_call.choice_for(torch.bfloat16, CPU, 17, 24, False)
    assert first_calls.measured == [FORWARD, dataclasses.replace(FORWARD, B=32)]


def test_a_folder_that_cannot_be_written_is_no_failure(first_calls, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv(tables.FOLDER, str(blocked))
    with pytest.warns(UserWarning, match="known to this process only"):
        assert first_call.choice_for(torch.bfloat16, CPU, 16, 24, False).plan.block_h == 8
    first_call.choice_for(torch.bfloat16, CPU, 16, 24, False)
    assert len(first_calls.measured) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("too much"), ValueError("no draw"), RuntimeError("?")])
def test_a_failure_is_no_failure_of_the_call(first_calls, error, monkeypatch):
    def failing(key, device):
        raise error

    monkeypatch.setattr(first_call, "measure", failing)
    with pytest.warns(UserWarning, match="could not be tuned, and runs as planned"):
        plan = first_call.choice_for(torch.bfloat16, CPU, 16, 24, False).plan
    assert plan == make_plan(FORWARD.on(H200))


def test_an_empty_batch_is_not_tuned(first_calls):
    first_call.choice_for(torch.bfloat16, CPU, 0, 24, False)
    assert not first_calls.measured


def test_what_cannot_be_tuned_is_not_tried_again(first_calls, monkeypatch):
    def failing(key, device):
        first_calls.measured.append(key)
        return [Trial(make_plan(FORWARD.on(H200)), 1.0, reason="broken")]

    monkeypatch.setattr(first_call, "measure", failing)
    plans = {first_call.choice_for(torch.bfloat16, CPU, 16, 24, False).plan for _ in range(3)}
    assert plans == {make_plan(FORWARD.on(H200))} and len(first_calls.measured) == 1


def test_two_first_calls_at_once_tune_once(first_calls):
    """The second one waits for the first."""
    problem = FORWARD.on(H200)
    with first_call._tuning.lock:
        thread = threading.Thread(target=first_call.tune_now, args=(problem, CPU))
        thread.start()
        first_call._tried.add((H200.name, FORWARD))
    thread.join(60)
    assert not thread.is_alive() and not first_calls.measured


def test_without_a_folder_it_is_known_to_this_process(first_calls, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "user_folder", lambda: None)
    assert first_call.choice_for(torch.bfloat16, CPU, 16, 24, False).plan.block_h == 8
    assert not list(tmp_path.glob("*.json"))
