"""How each mode is timed, precompilation, the floors, and recovery from a hang."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import triton
from benches import CASE, OTHER, provider, results, rows, wanted
from tuned import FORWARD

from triton_lstm.perf import cold, floor, measure, warm, watchdog
from triton_lstm.perf.bench import all_combinations, calls_of_ours, run
from triton_lstm.perf.cases import MODES, Case
from triton_lstm.perf.check import make_problem
from triton_lstm.perf.clock import host_times_ms, times_after_ms
from triton_lstm.perf.floor import floor_names
from triton_lstm.perf.providers import OURS, PROVIDERS
from triton_lstm.perf.results import BASELINE
from triton_lstm.perf.watchdog import watched
from triton_lstm.planning.devices import GPUS

pytestmark = pytest.mark.usefixtures("short_floors")


def test_the_exchange_needs_every_program(device):
    from triton_lstm.perf.exchange_loop import ExchangeLoop

    gpu = device.type == "cuda"
    for kind in ("flag", "barrier"):
        loop = ExchangeLoop(2, 3, kind, device, one_launch=gpu)
        loop.run()
        assert loop.complete()
        loop.prepare()
        assert not loop.complete()


def test_an_exchange_that_goes_wrong_while_it_is_timed_has_no_time(device, monkeypatch):
    class Tired(floor.ExchangeLoop):
        runs = 0

        def run(self):
            super().run()
            Tired.runs += 1
            if Tired.runs > 1:
                self.late.fill_(1)

    monkeypatch.setattr(floor, "ExchangeLoop", Tired)
    row = floor.measure_floor("exchange-flag-2", device)
    assert row["status"] == "wrong" and "us_per_step" not in row and Tired.runs > 1


def test_amd_has_no_flag_exchange_to_measure(monkeypatch):
    monkeypatch.setattr(floor, "device_facts", lambda device: GPUS["MI300X"])
    exchanges = [name for name in floor_names(torch.device("cuda")) if name.startswith("exchange-")]
    assert exchanges and all(name.startswith("exchange-barrier-") for name in exchanges)


def test_every_floor_without_a_gpu(device):
    if device.type == "cuda":
        pytest.skip("`make gpu-bench` measures them")
    for name in ("copy", "matmul-bf16", "exchange-flag-2", "exchange-barrier-2"):
        row = floor.measure_floor(name, device)
        assert row["status"] == "ok" and row["ms"] > 0, name


def test_every_mode(tmp_path, device):
    """Except the cold ones, which need new processes."""
    modes = tuple(mode for mode in MODES if not mode.startswith("cold"))
    run(wanted([PROVIDERS[BASELINE]], [dataclasses.replace(CASE, modes=modes)]), results(tmp_path), device)
    found = {mode: row for (case, _, mode), row in rows(tmp_path).items() if case == CASE.name}
    assert list(found) == list(modes)
    for mode, row in found.items():
        if mode == "graph_step" and device.type == "cpu":
            assert (row["status"], row["reason"]) == ("skipped", "CUDA graphs need a GPU")
        else:
            assert row["status"] == "ok" and row["ms"] > 0 and row["runs"] >= 3


def test_backward_excludes_its_forward(device):
    """Checks what is called between the time stamps, not how long it takes."""
    calls = []
    clock = SimpleNamespace(
        get_device_interface=lambda: SimpleNamespace(
            Event=lambda enable_timing: SimpleNamespace(
                record=lambda: calls.append("mark"), elapsed_time=lambda end: 100.0
            ),
            synchronize=lambda: None,
        ),
        get_empty_cache_for_benchmark=lambda: None,
        clear_cache=lambda cache: calls.append("clear"),
    )
    with patch.object(triton.runtime.driver, "_active", clock):
        times = times_after_ms(lambda: calls.append("forward"), lambda made: calls.append("backward"))
    assert calls == ["forward", "clear", "mark", "backward", "mark"] * 3 and times == [100.0]  # two to warm up


def test_a_cold_start(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cold", "fp32-T3-B2-I8-H8", BASELINE])
    cold.main()
    assert json.loads(capsys.readouterr().out)["ms"] > 0


def test_a_cold_start_finds_a_case_with_resets(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cold", "fp32-T6-B3-I8-H8-resets20%", BASELINE])
    cold.main()
    assert json.loads(capsys.readouterr().out)["ms"] > 0


def test_a_cold_start_that_fails(monkeypatch):
    with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
        measure.first_call_ms(Case("fp32", T=3, B=2, H=8), "nobody", "")
    monkeypatch.setattr(measure, "COLD_LIMIT_S", 0.01)
    with pytest.raises(RuntimeError, match=r"^no response from a new process within 0.01 s$"):
        measure.first_call_ms(Case("fp32", T=3, B=2, H=8), BASELINE, "")


def test_cold_has_empty_caches_and_cached_has_not(device, monkeypatch):
    seen = []

    def fill(case, provider, caches):
        seen.append(len(list(Path(caches).iterdir())))
        (Path(caches) / f"kernel{len(seen)}").touch()
        return float(len(seen))

    monkeypatch.setattr(measure, "first_call_ms", fill)
    problem = make_problem(CASE, device)
    runner = measure.Runner(problem, problem.twin, BASELINE)
    assert runner.turn("cold")() == [1.0] and runner.turn("cold")() == [2.0] and runner.turn("cold_cached")() == [3.0]
    assert seen == [0, 0, 1]
    other = measure.Runner(problem, problem.twin, BASELINE)
    assert other.turn("cold_cached")() == [5.0] and seen == [0, 0, 1, 0, 1]  # it fills them by itself


@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_what_every_mode_does(tmp_path, device, monkeypatch, precision):
    """Per call: autograd or not, train mode or not, new gradients, TF32 as in the case."""
    modes = ("inference", "forward", "backward", "forward_backward", "host_inference", "host_training")
    seen = {}

    def note(module, k):
        weight = module.inner.weight_hh_l0
        state = (torch.is_grad_enabled(), module.training, weight.grad is None, torch.backends.cudnn.allow_tf32)
        seen.setdefault(mode_now[0], set()).add(state)

    mode_now = ["check"]
    turn = measure.Runner.turn
    monkeypatch.setattr(measure.Runner, "turn", lambda self, mode: (mode_now.__setitem__(0, mode), turn(self, mode))[1])
    case = dataclasses.replace(CASE, precision=precision, modes=modes)
    run(wanted([provider("p", note)], [case]), results(tmp_path), device)
    tf32 = precision == "tf32"
    for mode in ("inference", "host_inference"):
        assert {(grad, train, t) for grad, train, _, t in seen[mode]} == {(False, False, tf32)}
    assert seen["forward"] == {(True, True, True, tf32)}
    for mode in ("backward", "forward_backward", "host_training"):
        assert {(grad, train, t) for grad, train, _, t in seen[mode]} == {(True, True, tf32)}


def test_gradients_are_fresh_in_every_call(device):
    problem = make_problem(CASE, device)
    runner = measure.Runner(problem, problem.twin, BASELINE)
    for _ in range(3):
        runner.both()
    once = runner.gradient().clone()
    runner.both()
    assert torch.equal(runner.gradient(), once)


def test_quantiles(tmp_path, device, monkeypatch):
    turns = iter([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, 10.0, 11.0]])
    monkeypatch.setattr(measure, "times_ms", lambda call, clear: next(turns))
    run([(CASE, PROVIDERS[BASELINE], "inference")], results(tmp_path), device)
    row = rows(tmp_path)[CASE.name, BASELINE, "inference"]
    assert (row["p20"], row["ms"], row["p80"], row["runs"]) == (3.0, 6.0, 9.0, 11)


def test_host_times_begin_with_an_idle_device():
    order = []
    interface = SimpleNamespace(synchronize=lambda: order.append("idle"))
    with patch.object(triton.runtime.driver, "_active", SimpleNamespace(get_device_interface=lambda: interface)):
        times = host_times_ms(lambda: order.append("call"))
    assert order[:3] == ["call", "idle", "call"] and order[-1] == "idle" and len(times) >= 3
    assert order.count("call") == len(times) + 1 and "callcall" not in "".join(order)


def test_the_watchdog(tmp_path, monkeypatch):
    marker, alarms = tmp_path / "x.running", []
    monkeypatch.setattr(watchdog, "HANG_S", 0.2)
    with watched(marker, lambda: alarms.append("hangs"), interval=0.02):
        time.sleep(0.3)
        assert not alarms  # nothing is being measured
        for _ in range(10):
            marker.touch()
            time.sleep(0.04)
        assert not alarms  # one thing after another
        time.sleep(0.5)
        assert alarms == ["hangs"]
    with watched(marker, lambda: alarms.append("again"), interval=0.02):
        marker.touch()
    time.sleep(0.4)
    assert alarms == ["hangs"]  # the run is over


def test_kernels_are_precompiled_in_other_processes(device, caplog, monkeypatch):
    warm.compile_case(CASE)
    bad = Case("fp32", T=2, B=2, H=-1)
    cases = [CASE, OTHER, bad, Case("fp32", T=2, B=2, H=4, packed=True), Case("fp32", T=9, B=2, H=4, resets=0.1)]
    jobs = warm.jobs_of_bench([(case, OURS) for case in cases], ["copy"]) | warm.jobs_of_tune([FORWARD])
    assert warm.compile_all(jobs, workers=2) == 5
    assert [record.getMessage() for record in caplog.records] == [f"{bad.name}, triton_lstm was not precompiled"]
    monkeypatch.setattr(floor, "STEPS", floor.STEPS)
    warm.compile_floor("exchange-flag-2")


def test_every_provider_with_our_kernels_is_precompiled(device, tmp_path):
    """Including the one that recomputes the gates, which has a different forward kernel."""
    store = results(tmp_path)
    every = all_combinations([CASE, OTHER])
    names = list(warm.jobs_of_bench(calls_of_ours(every, store, device), ["copy", "exchange-flag-2"]))
    ours = ("triton_lstm", "triton_lstm recompute")
    assert names == [f"{case.name}, {who}" for case in (CASE, OTHER) for who in ours] + ["exchange-flag-2"]
    store.add(*({"case": OTHER.name, "provider": who, "mode": "inference", "status": "ok"} for who in ours))
    assert calls_of_ours(every, store, device) == [(CASE, who) for who in ours]


def test_hanging_jobs_are_terminated(device, caplog, monkeypatch):
    monkeypatch.setattr(warm, "LIMIT_S", 0.01)
    assert warm.compile_all(warm.jobs_of_bench([(CASE, OURS)], []), workers=1) == 0
    assert "within" in caplog.text
