"""The run of a suite: what fails is recorded, nothing measured is lost, and a run goes on where another stopped."""

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
from torch import nn

from triton_lstm.config import UsageError
from triton_lstm.perf import bench, cold, floor, measure, warm, watchdog
from triton_lstm.perf.bench import DeviceLostError, run
from triton_lstm.perf.cases import MODES, Case
from triton_lstm.perf.check import draw
from triton_lstm.perf.clock import host_times_ms, times_after_ms
from triton_lstm.perf.machine import machine
from triton_lstm.perf.providers import OURS, PROVIDERS, Provider
from triton_lstm.perf.results import YARDSTICK, Results, load
from triton_lstm.perf.watchdog import watched

CASE = Case("fp32", T=2, B=2, H=4, modes=("inference", "forward_backward"), why="a test")
OTHER = Case("fp32", T=3, B=2, H=4, modes=("inference",), why="another")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(floor, "floor_names", lambda device: ["copy", "matmul-fp32"])


def provider(name, behave):
    """nn.LSTM, which calls behave(module, k) before its k-th call."""

    class Fake(nn.Module):
        def __init__(self, case, twin):
            super().__init__()
            self.inner, self.calls = twin, 0

        def forward(self, x):
            behave(self, self.calls)
            self.calls += 1
            return self.inner(x)

    return Provider(name, name, lambda case, device: None, Fake)


def fail_at(k, error):
    def behave(module, call):
        if call >= k:
            raise error

    return behave


def wanted(providers, cases=(CASE,)):
    return [(case, p, mode) for case in cases for p in providers for mode in case.modes]


def results(path):
    return Results(path / "bench_smoke.csv", machine())


def rows(path):
    frame = load([path / "bench_smoke.csv"])
    return {(row["case"], row["provider"], row["mode"]): row for _, row in frame.iterrows()}


def test_a_run(tmp_path, device):
    run(wanted([PROVIDERS[OURS], PROVIDERS[YARDSTICK]]), results(tmp_path), device)
    found = rows(tmp_path)
    for mode in CASE.modes:
        ours, theirs = found[CASE.name, OURS, mode], found[CASE.name, YARDSTICK, mode]
        assert ours["status"] == theirs["status"] == "ok"
        assert 0 < ours["p20"] <= ours["ms"] <= ours["p80"] and ours["runs"] >= measure.TURNS
        assert ours["speedup"] == pytest.approx(theirs["ms"] / ours["ms"], rel=1e-4)
        assert ours["us_per_step"] == pytest.approx(ours["ms"] * 1e3 / 2, rel=1e-4)
        assert ours["floor_share"] == pytest.approx(ours["floor_ms"] / ours["ms"], rel=1e-4) and ours["floor_ms"] > 0
        assert ours["error_share"] <= 1 and ours["why"] == "a test" and ours["algorithm"] == ""
        assert theirs["algorithm"] in ("CPU", "PERSIST_STATIC_SMALL_H", "SMALL_H")
    assert {key[0] for key in found if key[1] == "device"} == {"copy", "matmul-fp32"}
    assert found["copy", "device", "floor"]["gbs"] > 0 and found["matmul-fp32", "device", "floor"]["tflops"] > 0


def test_providers_are_taken_in_turn(tmp_path, device, monkeypatch):
    order = []
    fakes = [provider(name, lambda module, k, name=name: order.append(name)) for name in "ab"]
    monkeypatch.setattr(measure.Runner, "peak_mb", lambda self, mode: 0.0)
    run([(CASE, fake, "inference") for fake in fakes], results(tmp_path), device)
    turns = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert measure.TURNS == 3 and turns == ["a", "b", "a", "b", "a", "b"]  # the check; turns ab, ba, ab


@pytest.mark.parametrize(
    "error, status",
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "out of memory"),
        (MemoryError(), "out of memory"),
        (ValueError("first line\nsecond"), "failed"),
    ],
)
def test_a_failing_provider_is_recorded_and_the_run_goes_on(tmp_path, device, capsys, error, status):
    bad = provider("bad", fail_at(0, error))
    late = provider("late", fail_at(3, error))  # passes the check
    run(wanted([bad, late, PROVIDERS[YARDSTICK]], [CASE, OTHER]), results(tmp_path), device)
    found = rows(tmp_path)
    for case in (CASE, OTHER):
        row = found[case.name, "bad", "all"]
        assert row["status"] == status and type(error).__name__ in row["reason"] and "\n" not in row["reason"]
        assert found[case.name, "late", "inference"]["status"] == status
        assert found[case.name, YARDSTICK, "inference"]["status"] == "ok"
    assert found[CASE.name, "late", "forward_backward"]["status"] == status
    assert f"{CASE.name}, bad: {status}" in capsys.readouterr().out


def test_no_time_is_shown_for_a_wrong_provider(tmp_path, device):
    class Wrong(nn.Module):
        def __init__(self, case, twin):
            super().__init__()
            self.inner = twin

        def forward(self, x):
            y, states = self.inner(x)
            return y * 1.01, states

    wrong = Provider("wrong", "", lambda case, device: None, Wrong)
    run(wanted([wrong, PROVIDERS[YARDSTICK]]), results(tmp_path), device)
    mine = {mode: row for (_, name, mode), row in rows(tmp_path).items() if name == "wrong"}
    assert list(mine) == ["all"] and mine["all"]["status"] == "wrong" and mine["all"]["ms"] != mine["all"]["ms"]
    assert mine["all"]["error_share"] > 1


def test_nothing_to_compare_with(tmp_path, device, monkeypatch):
    def broken(problem):
        raise torch.OutOfMemoryError("float64 is too large")

    monkeypatch.setattr(bench, "Check", broken)
    run(wanted([PROVIDERS[OURS], PROVIDERS[YARDSTICK]]), results(tmp_path), device)
    for name in (OURS, YARDSTICK):
        row = rows(tmp_path)[CASE.name, name, "all"]
        assert row["status"] == "unchecked" and "float64 is too large" in row["reason"]


def test_a_rerun_measures_only_what_is_missing(tmp_path, device, monkeypatch):
    run(wanted([PROVIDERS[YARDSTICK]]), results(tmp_path), device)
    before = rows(tmp_path)
    calls = []
    fake = provider("new", lambda module, k: calls.append(k))
    run(wanted([PROVIDERS[YARDSTICK], fake]), results(tmp_path), device)
    after = rows(tmp_path)
    assert set(after) - set(before) == {(CASE.name, "new", mode) for mode in CASE.modes} and calls
    assert all(after[key].equals(before[key]) for key in before)
    calls.clear()
    monkeypatch.setattr(bench, "_CaseRun", None)  # nothing is left to run
    monkeypatch.setattr(floor, "measure_floor", None)
    run(wanted([PROVIDERS[YARDSTICK], fake]), results(tmp_path), device)
    assert not calls


def test_ctrl_c_loses_nothing(tmp_path, device):
    stop = provider("stop", fail_at(3, KeyboardInterrupt()))
    kept = results(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(wanted([PROVIDERS[YARDSTICK], stop], [OTHER, CASE]), kept, device)
    kept.end()  # as the command does
    assert (OTHER.name, "stop", "inference") not in rows(tmp_path)
    run(
        wanted([PROVIDERS[YARDSTICK], provider("stop", lambda module, k: None)], [OTHER, CASE]),
        results(tmp_path),
        device,
    )
    assert all(row["status"] == "ok" for row in rows(tmp_path).values())


@pytest.mark.parametrize("calls, mode", [(0, "all"), (5, "inference")])
def test_what_killed_a_process_is_not_tried_again(tmp_path, device, calls, mode):
    class Killed(BaseException):
        """Stands for a kill: nobody catches it, and nothing is written after it."""

    killer = provider("killer", fail_at(calls, Killed()))
    with pytest.raises(Killed):
        run(wanted([killer, PROVIDERS[YARDSTICK]]), results(tmp_path), device)
    run(
        wanted([killer, PROVIDERS[YARDSTICK]]) if calls == 0 else wanted([PROVIDERS[YARDSTICK]]),
        results(tmp_path),
        device,
    )
    found = rows(tmp_path)
    assert (
        found[CASE.name, "killer", mode]["status"] == "failed" and "died" in found[CASE.name, "killer", mode]["reason"]
    )
    assert found[CASE.name, YARDSTICK, "inference"]["status"] == "ok"


def test_a_kill_while_the_yardstick_runs_ends_the_case_for_all(tmp_path, device, monkeypatch):
    def killed(problem):
        raise SystemExit

    monkeypatch.setattr(bench, "Check", killed)
    with pytest.raises(SystemExit):
        run(wanted([PROVIDERS[OURS], PROVIDERS[YARDSTICK]]), results(tmp_path), device)
    run(wanted([PROVIDERS[OURS], PROVIDERS[YARDSTICK]]), results(tmp_path), device)  # does not check again
    assert {row["reason"] for key, row in rows(tmp_path).items() if key[1] != "device"} == {
        "the process died while measuring this"
    }


def test_a_damaged_marker_does_no_harm(tmp_path, device):
    run(wanted([PROVIDERS[YARDSTICK]]), results(tmp_path), device)
    (tmp_path / "bench_smoke.running").write_text('[{"case": "fp3')
    before = len(rows(tmp_path))
    results(tmp_path)
    assert len(rows(tmp_path)) == before and not (tmp_path / "bench_smoke.running").exists()


def test_a_lost_gpu_ends_the_run_after_recording_who_lost_it(tmp_path, device, monkeypatch):
    bad = provider("bad", fail_at(0, RuntimeError("an illegal memory access was encountered")))

    def lost(device):
        raise DeviceLostError("an illegal memory access was encountered")

    monkeypatch.setattr(floor, "floor_names", lambda device: [])
    answers = iter([lambda device: None, lost])  # well at the start
    monkeypatch.setattr(bench, "_device_still_there", lambda device: next(answers)(device))
    with pytest.raises(DeviceLostError):
        run(wanted([bad, PROVIDERS[YARDSTICK]]), results(tmp_path), device)
    monkeypatch.setattr(bench, "_device_still_there", lambda device: None)
    run(wanted([bad, PROVIDERS[YARDSTICK]]), results(tmp_path), device)
    dead = rows(tmp_path)[CASE.name, "bad", "all"]
    assert dead["status"] == "failed" and "illegal memory access" in dead["reason"]  # the reason, not "died"
    assert rows(tmp_path)[CASE.name, YARDSTICK, "inference"]["status"] == "ok"


def test_a_gpu_that_takes_no_work_from_the_start(tmp_path, device, monkeypatch):
    def lost(device):
        raise DeviceLostError("busy")

    monkeypatch.setattr(bench, "_device_still_there", lost)
    with pytest.raises(UsageError, match="takes no work"):
        run(wanted([PROVIDERS[YARDSTICK]]), results(tmp_path), device)
    assert not (tmp_path / "bench_smoke.csv").exists()


def test_a_failed_capture_ends_the_process(tmp_path, device, monkeypatch):
    case = dataclasses.replace(CASE, modes=("graph_step", "inference"))

    def fails(self):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(measure.Runner, "captured_step", fails)
    with pytest.raises(DeviceLostError, match="captured"):
        run(wanted([PROVIDERS[YARDSTICK]], [case]), results(tmp_path), device)
    run(wanted([PROVIDERS[YARDSTICK]], [case]), results(tmp_path), device)
    found = rows(tmp_path)
    assert "is capturing" in found[CASE.name, YARDSTICK, "graph_step"]["reason"]
    assert found[CASE.name, YARDSTICK, "inference"]["status"] == "ok"


def test_retry_measures_failures_again(tmp_path, device):
    run(wanted([provider("p", fail_at(0, ValueError("x")))]), results(tmp_path), device)
    again = results(tmp_path)
    again.drop_failures()
    run(wanted([provider("p", lambda module, k: None)]), again, device)
    assert {row["status"] for row in rows(tmp_path).values()} == {"ok"}


@pytest.mark.parametrize("name", ["gpu", "torch", "triton", "cudnn", "sources", "driver"])
def test_rows_of_two_machines_or_codes_do_not_mix(tmp_path, name):
    Results(tmp_path / "bench_smoke.csv", machine()).add({"case": "copy", "provider": "device", "mode": "floor"})
    with pytest.raises(UsageError, match=f"with {name}"):
        Results(tmp_path / "bench_smoke.csv", machine() | {name: "another"})


def test_a_failing_floor_is_recorded(tmp_path, device, monkeypatch):
    def broken(name, device):
        raise ValueError("no such unit")

    monkeypatch.setattr(floor, "measure_floor", broken)
    run(wanted([PROVIDERS[YARDSTICK]]), results(tmp_path), device)
    found = rows(tmp_path)
    assert found["copy", "device", "floor"]["status"] == "failed"
    assert found[CASE.name, YARDSTICK, "inference"]["status"] == "ok"
    assert found[CASE.name, YARDSTICK, "inference"]["floor_ms"] != found[CASE.name, YARDSTICK, "inference"]["floor_ms"]


def test_the_exchange_needs_every_program(device):
    from triton_lstm.perf.exchange_loop import ExchangeLoop

    gpu = device.type == "cuda"
    for kind in ("flag", "barrier"):
        loop = ExchangeLoop(2, 3, kind, device, one_launch=gpu)
        loop.run()
        assert loop.complete()
        loop.prepare()
        assert not loop.complete()


def test_every_floor_off_a_gpu(device):
    if device.type == "cuda":
        pytest.skip("`make gpu-bench` measures them")
    for name in ("copy", "matmul-bf16", "exchange-flag-2", "exchange-barrier-2"):
        row = floor.measure_floor(name, device)
        assert row["status"] == "ok" and row["ms"] > 0, name


def test_every_mode(tmp_path, device):
    """But for the cold ones, which have processes of their own."""
    modes = tuple(mode for mode in MODES if not mode.startswith("cold"))
    run(wanted([PROVIDERS[YARDSTICK]], [dataclasses.replace(CASE, modes=modes)]), results(tmp_path), device)
    found = {mode: row for (case, _, mode), row in rows(tmp_path).items() if case == CASE.name}
    assert list(found) == list(modes)
    for mode, row in found.items():
        if mode == "graph_step" and device.type == "cpu":
            assert (row["status"], row["reason"]) == ("skipped", "CUDA graphs need a GPU")
        else:
            assert row["status"] == "ok" and row["ms"] > 0 and row["runs"] >= 3


def test_backward_leaves_its_forward_out(device):
    """By what is called between the clock's marks, not by how long it takes."""
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
    monkeypatch.setattr(sys, "argv", ["cold", "fp32-T3-B2-I8-H8", YARDSTICK])
    cold.main()
    assert json.loads(capsys.readouterr().out)["ms"] > 0


def test_a_cold_start_that_fails(monkeypatch):
    with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
        measure.first_call_ms(Case("fp32", T=3, B=2, H=8), "nobody", "")
    monkeypatch.setattr(measure, "COLD_LIMIT_S", 0.01)
    with pytest.raises(RuntimeError, match=r"^no answer of a fresh process within 0.01 s$"):
        measure.first_call_ms(Case("fp32", T=3, B=2, H=8), YARDSTICK, "")


def test_cold_is_with_empty_caches_and_cached_is_not(device, monkeypatch):
    seen = []

    def fill(case, provider, caches):
        seen.append(len(list(Path(caches).iterdir())))
        (Path(caches) / f"kernel{len(seen)}").touch()
        return float(len(seen))

    monkeypatch.setattr(measure, "first_call_ms", fill)
    problem = draw(CASE, device)
    runner = measure.Runner(problem, problem.twin, YARDSTICK)
    assert runner.turn("cold")() == [1.0] and runner.turn("cold")() == [2.0] and runner.turn("cold_cached")() == [3.0]
    assert seen == [0, 0, 1]
    other = measure.Runner(problem, problem.twin, YARDSTICK)
    assert other.turn("cold_cached")() == [5.0] and seen == [0, 0, 1, 0, 1]  # it fills them by itself


@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_what_every_mode_does(tmp_path, device, monkeypatch, precision):
    """In each of its calls: autograd or not, train mode or not, fresh gradients, TF32 as the case has it."""
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
    problem = draw(CASE, device)
    runner = measure.Runner(problem, problem.twin, YARDSTICK)
    for _ in range(3):
        runner.both()
    once = runner.gradient().clone()
    runner.both()
    assert torch.equal(runner.gradient(), once)


def test_quantiles(tmp_path, device, monkeypatch):
    turns = iter([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, 10.0, 11.0]])
    monkeypatch.setattr(measure, "times_ms", lambda call, clear: next(turns))
    run([(CASE, PROVIDERS[YARDSTICK], "inference")], results(tmp_path), device)
    row = rows(tmp_path)[CASE.name, YARDSTICK, "inference"]
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
    with watched(marker, lambda: alarms.append("hangs"), look_every=0.02):
        time.sleep(0.3)
        assert not alarms  # nothing is being measured
        for _ in range(10):
            marker.touch()
            time.sleep(0.04)
        assert not alarms  # one thing after another
        time.sleep(0.5)
        assert alarms == ["hangs"]
    with watched(marker, lambda: alarms.append("again"), look_every=0.02):
        marker.touch()
    time.sleep(0.4)
    assert alarms == ["hangs"]  # the run is over


def test_kernels_are_compiled_ahead_in_other_processes(device, caplog, monkeypatch):
    warm.compile_case(CASE)
    bad = Case("fp32", T=2, B=2, H=-1)
    warm.compile_all([CASE, OTHER, bad, Case("fp32", T=2, B=2, H=4, packed=True)], [], workers=2)
    assert [record.getMessage() for record in caplog.records] == [f"{bad.name} was not compiled ahead"]
    monkeypatch.setattr(floor, "STEPS", floor.STEPS)
    warm.compile_floor("exchange-flag-2")


def test_what_does_not_end_is_not_waited_for(device, caplog, monkeypatch):
    monkeypatch.setattr(warm, "LIMIT_S", 0.01)
    warm.compile_all([CASE], [], workers=1)
    assert "within" in caplog.text
