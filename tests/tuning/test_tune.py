"""Tuning without a GPU: Triton's autotuner over the concurrent interpreter, with a clock that the tests set."""

import dataclasses
import json
import math

import pytest
import torch
import triton
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpretedFunction
from tuned import BACKWARD, FORWARD, H200, Clock

import triton_lstm
import triton_lstm.kernels
import triton_lstm.kernels.configs as configs
from triton_lstm.kernels.exchange import fill_with_sentinel
from triton_lstm.operator import layer
from triton_lstm.perf.clock import timing
from triton_lstm.perf.layer_times import layer_times
from triton_lstm.planning.space import make_plan, space
from triton_lstm.tuning import measure as tune
from triton_lstm.tuning.table_file import Key, LayerTime

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")
CPU = torch.device("cpu")


def measure(key, clock, **kwargs):
    return tune.measure(key, CPU, clock=clock, steps=4, begin=clock.begin, **kwargs)


@pytest.mark.parametrize("key", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_the_fastest_config_wins(key):
    clock = Clock(lambda plan: 0.5 if plan.exchange == "barrier" and plan.block_h == 8 else 2.0)
    trials = measure(key, clock)
    found = tune.best(key, trials)
    assert found.plan.exchange == "barrier" and found.plan.block_h == 8
    assert found.us == pytest.approx(0.5e3 / 4) and found.planned_us == pytest.approx(2e3 / 4)
    measured = [trial for trial in trials if math.isfinite(trial.us)]
    assert {trial.plan.exchange for trial in measured} == {"none", "flag", "barrier"}
    assert len(measured) <= configs.BEST + 4 * configs.BEST_OF_OTHERS


@pytest.mark.parametrize("key", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_what_is_compiled_ahead_is_what_is_measured(key, monkeypatch):
    if not hasattr(InterpretedFunction, "warmup"):
        pytest.skip("the interpreter of Triton 3.5 has no warmup")
    seen = {warmup: set() for warmup in (False, True)}
    shipped = InterpretedFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        dtypes = {name: value.dtype if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
        for name in ("step_begin", "step_end", "T", "B"):  # which are not specialized
            assert isinstance(dtypes.pop(name), int)
        seen[warmup].add(str(sorted(dtypes.items())))
        return shipped(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    tune.compile_ahead(key, CPU)
    assert not seen[False]  # nothing is run
    trials = measure(key, Clock())
    assert seen[True] == seen[False] and len(seen[True]) == sum(math.isfinite(trial.us) for trial in trials) > 4


def test_the_planned_config_is_the_first_and_always_measured():
    trials = measure(FORWARD, Clock())
    assert trials[0].plan == make_plan(FORWARD.on(H200)) and math.isfinite(trials[0].us)


def test_every_config_has_a_time_or_a_reason():
    trials = measure(BACKWARD, Clock())
    everything = {dataclasses.replace(plan, groups=1) for plan in space(BACKWARD.on(H200))}
    assert {dataclasses.replace(trial.plan, groups=1) for trial in trials} == everything
    assert all(math.isfinite(trial.us) != bool(trial.reason) for trial in trials)
    assert any("not measured" in trial.reason for trial in trials)


def test_each_config_is_checked_before_it_is_timed(monkeypatch):
    """Two calls a config: one for the answer, one of the clock; none for what is not measured."""
    clock = Clock()
    calls = []
    shipped = configs.make_ready
    monkeypatch.setattr(configs, "make_ready", lambda *args: (calls.append(args[0]), shipped(*args)))
    measured = [trial for trial in measure(FORWARD, clock) if math.isfinite(trial.us)]
    assert len(calls) == 2 * len(measured) and len(clock.begun) == len(measured)


def _nobody_waits(kind):
    """make_ready without what one exchange waits for: a counter that has arrived long ago, and a buffer of zeros."""

    def make_ready(exchange, buffer, counter, parts=None):
        if exchange == "flag" != kind:
            fill_with_sentinel(buffer)
        elif exchange == "flag":
            buffer.zero_()
        if counter is not None:
            counter.fill_(1 << 20 if exchange == kind else 0)
        if parts is not None:
            parts.zero_()

    return make_ready


@pytest.mark.parametrize("kind", ["flag", "barrier"])
@pytest.mark.parametrize("key", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_a_wrong_answer_is_named_and_never_chosen(key, kind, monkeypatch):
    """What is read is too early more often than not; and what the trial before has written cannot make up for it."""
    monkeypatch.setattr(configs, "make_ready", _nobody_waits(kind))
    monkeypatch.setattr(configs, "BEST_OF_OTHERS", configs.BEST)
    trials = measure(key, Clock(lambda plan: 0.1 if plan.exchange == kind else 1.0))
    wrong = [trial for trial in trials if "times the error that is allowed" in trial.reason]
    assert wrong and wrong == [trial for trial in trials if trial.failed]
    assert all(trial.plan.exchange == kind for trial in wrong)
    assert tune.best(key, trials).plan not in [trial.plan for trial in wrong]


def test_an_output_that_nobody_writes_is_no_right_answer(monkeypatch):
    """Not even where the trial before has left the right one."""
    planned = make_plan(FORWARD.on(H200))
    shipped = triton_lstm.kernels.lstm_forward_kernel.run

    def run(*args, **kwargs):
        lost = kwargs["num_warps"] != planned.warps  # this one's gates go elsewhere
        gates = torch.empty_like(kwargs["gates_ptr"]) if lost else kwargs["gates_ptr"]
        return shipped(*args, **kwargs | {"gates_ptr": gates})

    monkeypatch.setattr(triton_lstm.kernels.lstm_forward_kernel, "run", run, raising=False)
    failed = [trial for trial in measure(FORWARD, Clock()) if trial.failed]
    assert failed and all("its gates has" in t.reason and t.plan.warps != planned.warps for t in failed)


def test_a_config_that_fails_is_named_and_never_chosen(monkeypatch):
    shipped = triton_lstm.kernels.lstm_forward_kernel.run

    def run(*args, TILE, **kwargs):
        if TILE.BLOCK_H == 8:
            raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
        return shipped(*args, TILE=TILE, **kwargs)

    monkeypatch.setattr(triton_lstm.kernels.lstm_forward_kernel, "run", run, raising=False)
    trials = measure(FORWARD, Clock(lambda plan: 0.1 if plan.block_h == 8 else 1.0))
    failed = [trial for trial in trials if "too many blocks" in trial.reason]
    assert failed and failed == [trial for trial in trials if trial.failed]
    assert all(trial.plan.block_h == 8 for trial in failed)
    assert tune.best(FORWARD, trials).plan.block_h != 8


def test_nothing_is_chosen_where_nothing_runs(monkeypatch):
    def run(*args, **kwargs):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(triton_lstm.kernels.lstm_forward_kernel, "run", run, raising=False)
    trials = measure(FORWARD, Clock())
    assert tune.best(FORWARD, trials) is None
    assert "no kernel image" in trials[0].reason


def test_a_config_that_is_refused_beforehand_does_not_run(monkeypatch):
    def run(*args, **kwargs):
        raise AssertionError("it ran")

    monkeypatch.setattr(triton_lstm.kernels.lstm_forward_kernel, "run", run, raising=False)
    trials = tune.measure(FORWARD, CPU, clock=run, steps=4, begin=lambda plan: "no")
    assert all(math.isnan(trial.us) for trial in trials) and trials[0].reason == "no"


def test_tuning_leaves_the_random_numbers_alone():
    before = torch.random.get_rng_state()
    measure(FORWARD, Clock())
    assert torch.equal(torch.random.get_rng_state(), before)


class TestTimesOnDisk:
    """Triton's own cache, which the interpreter goes round; here its lookup is made up, JSON as there."""

    @pytest.fixture(autouse=True)
    def cache(self, monkeypatch):
        self.keys, self.found = [], {}

        def check(tuner, key, pruned, bench):
            self.keys.append(key)
            if key not in self.found:
                bench()
                kept = [(config.__dict__, times) for config, times in tuner.configs_timings.items()]
                self.found[key] = json.dumps({"key": key, "configs_timings": kept})
                return False
            kept = json.loads(self.found[key])["configs_timings"]
            tuner.configs_timings = {triton.Config(**config): times for config, times in kept}
            tuner.cache[key] = min(tuner.configs_timings, key=tuner.configs_timings.get)
            return True

        monkeypatch.setattr(Autotuner, "check_disk_cache", check)
        always = property(lambda tuner: True, lambda *_: None)
        monkeypatch.setattr(configs.TileAutotuner, "cache_results", always, raising=False)

    def test_they_are_taken_and_nothing_is_measured(self):
        clock = Clock(lambda plan: 0.5 if plan.block_h == 8 else 1.0)
        first = measure(FORWARD, clock)
        begun = len(clock.begun)
        second = measure(FORWARD, clock)
        assert len(clock.begun) == begun
        assert [trial.us for trial in second if trial.us == trial.us] == [
            trial.us for trial in first if trial.us == trial.us
        ]

    def test_they_are_of_one_layer(self):
        clock = Clock()
        for key in (FORWARD, dataclasses.replace(FORWARD, H=32), dataclasses.replace(FORWARD, dtype="fp16")):
            before = len(clock.begun)
            measure(key, clock)
            assert len(clock.begun) > before
        assert len(set(self.keys)) == len(self.keys)

    def test_a_failure_is_not_kept(self):
        def refusing(plan):
            return "the GPU is busy" if plan.exchange == "flag" else None

        first = tune.measure(FORWARD, CPU, clock=lambda call, quantiles: [1.0] * 3, steps=4, begin=refusing)
        assert any(trial.failed for trial in first)
        second = measure(FORWARD, Clock())
        assert not any(trial.failed for trial in second)
        assert any(trial.plan.exchange == "flag" and math.isfinite(trial.us) for trial in second)

    def test_they_are_of_one_gpu(self, monkeypatch):
        measure(FORWARD, Clock())
        monkeypatch.setattr(configs, "device_facts", lambda device: H200._replace(name="NVIDIA H100"))
        clock = Clock()
        measure(FORWARD, clock)
        assert clock.begun and len(set(self.keys)) == len(self.keys)


@pytest.mark.parametrize("quantiles", [(0.5,), (0.5, 0.2, 0.8)])
def test_the_clock_gives_a_time_for_every_quantile(quantiles):
    with timing(CPU):
        times = tune.gpu_clock(lambda: None, quantiles)
    assert len(times) == len(quantiles) and all(ms >= 0 for ms in times)


def test_layer_times(monkeypatch):
    monkeypatch.setattr("triton_lstm.perf.layer_times.provenance", lambda: "today")
    ms = iter([1.0, 2.0, 3.0, 4.0])

    def clock(call, quantiles):
        call()
        return [next(ms)]

    monkeypatch.setattr(layer, "plan_for", lambda *_, backward: make_plan(Key(backward, "bf16", 24, 3).on(H200)))
    times = layer_times("bf16", 24, 3, CPU, clock, steps=4)
    assert times == [
        LayerTime("inference", "bf16", 24, 3, 250.0, 750.0, "today"),
        LayerTime("training", "bf16", 24, 3, 500.0, 1000.0, "today"),
    ]


def test_programs_that_do_not_fit_at_once_are_not_measured(monkeypatch):
    alone = dataclasses.replace(make_plan(FORWARD.on(H200)), one_launch=False)
    monkeypatch.setattr(tune, "make_plan", lambda problem: alone)
    monkeypatch.setattr(triton_lstm.kernels, "device_facts", lambda device: H200)
    monkeypatch.setattr(tune, "_launch", lambda *_: pytest.fail("something was launched"))
    (trial,) = tune.measure(FORWARD, torch.device("cpu"))
    assert math.isnan(trial.us) and trial.reason == "its programs do not fit the GPU at once"
    tune.compile_ahead(FORWARD, torch.device("cpu"))
