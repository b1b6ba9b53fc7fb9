"""The run of a suite: failures are recorded, no measurement is lost, and a stopped run is resumed."""

import dataclasses

import pytest
import torch
from benches import CASE, OTHER, fail_at, provider, results, rows, wanted
from torch import nn

from triton_lstm.perf import bench, failures, floor, measure, store
from triton_lstm.perf.bench import run
from triton_lstm.perf.failures import DeviceLostError
from triton_lstm.perf.providers import OURS, PROVIDERS, Provider
from triton_lstm.perf.results import BASELINE
from triton_lstm.perf.store import Store
from triton_lstm.settings import UsageError
from triton_lstm.system.machine import machine

pytestmark = pytest.mark.usefixtures("short_floors")


def test_a_run(tmp_path, device):
    run(wanted([PROVIDERS[OURS], PROVIDERS[BASELINE]]), results(tmp_path), device)
    found = rows(tmp_path)
    for mode in CASE.modes:
        ours, theirs = found[CASE.name, OURS, mode], found[CASE.name, BASELINE, mode]
        assert ours["status"] == theirs["status"] == "ok"
        assert 0 < ours["p20"] <= ours["ms"] <= ours["p80"] and ours["runs"] >= measure.TURNS
        assert ours["speedup"] == pytest.approx(theirs["ms"] / ours["ms"], rel=1e-4)
        assert ours["us_per_step"] == pytest.approx(ours["ms"] * 1e3 / 2, rel=1e-4)
        assert ours["floor_share"] == pytest.approx(ours["floor_ms"] / ours["ms"], rel=1e-4) and ours["floor_ms"] > 0
        assert ours["error_share"] <= 1 and ours["why"] == "a test" and ours["algorithm"] == ""
        assert theirs["algorithm"] in ("CPU", "PERSIST_STATIC_SMALL_H", "SMALL_H")
    assert {key[0] for key in found if key[1] == "device"} == {"copy", "matmul-fp32"}
    assert found["copy", "device", "floor"]["gbs"] > 0 and found["matmul-fp32", "device", "floor"]["tflops"] > 0


def test_providers_alternate(tmp_path, device, monkeypatch):
    order = []
    fakes = [provider(name, lambda module, k, name=name: order.append(name)) for name in "ab"]
    monkeypatch.setattr(measure.Runner, "peak_mb", lambda self, mode: 0.0)
    monkeypatch.setattr(bench._CaseRun, "_note_clock", lambda self, runners: None)
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
def test_a_failing_provider_is_recorded_and_the_run_continues(tmp_path, device, capsys, error, status):
    bad = provider("bad", fail_at(0, error))
    late = provider("late", fail_at(3, error))  # passes the check
    run(wanted([bad, late, PROVIDERS[BASELINE]], [CASE, OTHER]), results(tmp_path), device)
    found = rows(tmp_path)
    for case in (CASE, OTHER):
        row = found[case.name, "bad", "all"]
        assert row["status"] == status and type(error).__name__ in row["reason"] and "\n" not in row["reason"]
        assert found[case.name, "late", "inference"]["status"] == status
        assert found[case.name, BASELINE, "inference"]["status"] == "ok"
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
    run(wanted([wrong, PROVIDERS[BASELINE]]), results(tmp_path), device)
    mine = {mode: row for (_, name, mode), row in rows(tmp_path).items() if name == "wrong"}
    assert list(mine) == ["all"] and mine["all"]["status"] == "wrong" and mine["all"]["ms"] != mine["all"]["ms"]
    assert mine["all"]["error_share"] > 1


def test_nothing_to_compare_with(tmp_path, device, monkeypatch):
    def broken(problem):
        raise torch.OutOfMemoryError("float64 is too large")

    monkeypatch.setattr(bench, "Check", broken)
    run(wanted([PROVIDERS[OURS], PROVIDERS[BASELINE]]), results(tmp_path), device)
    for name in (OURS, BASELINE):
        row = rows(tmp_path)[CASE.name, name, "all"]
        assert row["status"] == "unchecked" and "float64 is too large" in row["reason"]


def test_a_rerun_measures_only_what_is_missing(tmp_path, device, monkeypatch):
    run(wanted([PROVIDERS[BASELINE]]), results(tmp_path), device)
    before = rows(tmp_path)
    calls = []
    fake = provider("new", lambda module, k: calls.append(k))
    run(wanted([PROVIDERS[BASELINE], fake]), results(tmp_path), device)
    after = rows(tmp_path)
    assert set(after) - set(before) == {(CASE.name, "new", mode) for mode in CASE.modes} and calls
    assert all(after[key].equals(before[key]) for key in before)
    calls.clear()
    monkeypatch.setattr(bench, "_CaseRun", None)  # nothing is left to run
    monkeypatch.setattr(floor, "measure_floor", None)
    run(wanted([PROVIDERS[BASELINE], fake]), results(tmp_path), device)
    assert not calls


def test_ctrl_c_loses_nothing(tmp_path, device):
    stop = provider("stop", fail_at(3, KeyboardInterrupt()))
    kept = results(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(wanted([PROVIDERS[BASELINE], stop], [OTHER, CASE]), kept, device)
    kept.end()  # as the command does
    assert (OTHER.name, "stop", "inference") not in rows(tmp_path)
    run(
        wanted([PROVIDERS[BASELINE], provider("stop", lambda module, k: None)], [OTHER, CASE]),
        results(tmp_path),
        device,
    )
    assert all(row["status"] == "ok" for row in rows(tmp_path).values())


@pytest.mark.parametrize("calls, mode", [(0, "all"), (5, "inference")])
def test_a_measurement_that_crashed_is_not_repeated(tmp_path, device, calls, mode):
    class Killed(BaseException):
        """Simulates a kill: it is not caught, and nothing is written after it."""

    killer = provider("killer", fail_at(calls, Killed()))
    with pytest.raises(Killed):
        run(wanted([killer, PROVIDERS[BASELINE]]), results(tmp_path), device)
    run(
        wanted([killer, PROVIDERS[BASELINE]]) if calls == 0 else wanted([PROVIDERS[BASELINE]]),
        results(tmp_path),
        device,
    )
    found = rows(tmp_path)
    assert (
        found[CASE.name, "killer", mode]["status"] == "failed" and "died" in found[CASE.name, "killer", mode]["reason"]
    )
    assert found[CASE.name, BASELINE, "inference"]["status"] == "ok"


def test_a_crash_of_the_baseline_ends_the_case_for_all(tmp_path, device, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(problem):
        raise Killed

    monkeypatch.setattr(bench, "Check", killed)
    with pytest.raises(Killed):
        run(wanted([PROVIDERS[OURS], PROVIDERS[BASELINE]]), results(tmp_path), device)
    run(wanted([PROVIDERS[OURS], PROVIDERS[BASELINE]]), results(tmp_path), device)  # does not check again
    assert {row["reason"] for key, row in rows(tmp_path).items() if key[1] != "device"} == {
        "the process died while measuring this"
    }


NESTED = '[{"case": {"a": 1}, "provider": "b", "mode": "c"}]'


@pytest.mark.parametrize(
    "text", ['[{"case": "fp3', "", "null", "{}", NESTED, "[" * 100_000, "case,format\n\0,1\n", "T"]
)
def test_a_damaged_marker_does_no_harm(tmp_path, text):
    results(tmp_path).add({"case": "copy", "provider": "device", "mode": "floor", "status": "ok"})
    marker = tmp_path / "bench_smoke.running"
    if text == "T":  # one that was written, with another T
        results(tmp_path).begin({"case": "a", "provider": "b", "mode": "c", "T": 12345})
        text = marker.read_text().replace("12345", "many")
    marker.write_text(text)
    before = len(rows(tmp_path))
    results(tmp_path)
    assert len(rows(tmp_path)) == before and not (tmp_path / "bench_smoke.running").exists()


def test_a_lost_gpu_ends_the_run_after_recording_the_provider(tmp_path, device, monkeypatch):
    bad = provider("bad", fail_at(0, RuntimeError("an illegal memory access was encountered")))

    def lost(device):
        raise DeviceLostError("an illegal memory access was encountered")

    monkeypatch.setattr(floor, "floor_names", lambda device: [])
    answers = iter([lambda device: None, lost])  # well at the start
    monkeypatch.setattr(bench, "device_still_there", lambda device: next(answers)(device))
    with pytest.raises(DeviceLostError):
        run(wanted([bad, PROVIDERS[BASELINE]]), results(tmp_path), device)
    monkeypatch.setattr(bench, "device_still_there", lambda device: None)
    run(wanted([bad, PROVIDERS[BASELINE]]), results(tmp_path), device)
    dead = rows(tmp_path)[CASE.name, "bad", "all"]
    assert dead["status"] == "failed" and "illegal memory access" in dead["reason"]  # the reason, not "died"
    assert rows(tmp_path)[CASE.name, BASELINE, "inference"]["status"] == "ok"


def test_a_gpu_that_is_unusable_from_the_start(tmp_path, device, monkeypatch):
    def lost(device):
        raise DeviceLostError("busy")

    monkeypatch.setattr(bench, "device_still_there", lost)
    with pytest.raises(UsageError, match="the GPU is unusable"):
        run(wanted([PROVIDERS[BASELINE]]), results(tmp_path), device)
    assert not (tmp_path / "bench_smoke.csv").exists()


def test_a_failed_capture_ends_the_process(tmp_path, device, monkeypatch):
    case = dataclasses.replace(CASE, modes=("graph_step", "inference"))

    def fails(self):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(measure.Runner, "captured_step", fails)
    with pytest.raises(DeviceLostError, match="captured"):
        run(wanted([PROVIDERS[BASELINE]], [case]), results(tmp_path), device)
    run(wanted([PROVIDERS[BASELINE]], [case]), results(tmp_path), device)
    found = rows(tmp_path)
    assert "is capturing" in found[CASE.name, BASELINE, "graph_step"]["reason"]
    assert found[CASE.name, BASELINE, "inference"]["status"] == "ok"


def test_a_row_is_kept_until_the_repetition_replaces_it(tmp_path, device):
    modes = ("inference", "forward", "backward")
    case = dataclasses.replace(CASE, modes=modes)
    bad = [provider(name, fail_at(0, ValueError(name))) for name in "ab"]
    run(wanted(bad, [case]), results(tmp_path), device)
    again = results(tmp_path)
    for name in "ab":
        again.measure_again(again.get(case.name, name, "inference"))
    well, stop = provider("a", lambda module, k: None), provider("b", fail_at(0, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(wanted([well, stop], [case]), again, device)
    again.end()
    assert {row["reason"] for key, row in rows(tmp_path).items() if key[1] in "ab"} == {
        "ValueError: a",
        "ValueError: b",
    }
    run(wanted([well], [case]), again, device)
    found = {key[1:]: row["status"] for key, row in rows(tmp_path).items() if key[1] in "ab"}
    assert found == {("b", "all"): "failed"} | {("a", mode): "ok" for mode in modes}


def test_skipped_rows_are_reconsidered(tmp_path, device):
    reasons = ["is not installed"]
    able = dataclasses.replace(provider("p", lambda module, k: None), why_not=lambda case, device: reasons[0])
    run(wanted([able]), results(tmp_path), device)
    assert rows(tmp_path)[CASE.name, "p", "all"]["status"] == "skipped"
    reasons[0] = None
    run(wanted([able]), results(tmp_path), device)
    assert {key[2] for key in rows(tmp_path) if key[1] == "p"} == set(CASE.modes)


def test_an_interrupted_save_can_be_repeated(tmp_path, monkeypatch):
    def interrupted(frame, path):
        raise KeyboardInterrupt

    kept = results(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(store, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kept.add({"case": "copy", "provider": "device", "mode": "floor", "status": "ok"})
    kept.save()  # as the command does
    assert ("copy", "device", "floor") in rows(tmp_path)


class SpeechlessError(Exception):
    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    "error, reason",
    [
        (SystemExit(3), "SystemExit: 3"),
        (SpeechlessError(), "SpeechlessError: no message"),
        (ValueError("b\x1b\udcff\u2603"), "ValueError: b??\u2603"),
        (ValueError("x" * 999), "ValueError: " + "x" * 188),
    ],
)
def test_odd_failures(tmp_path, device, monkeypatch, error, reason):
    monkeypatch.setattr(failures.log, "error", lambda *arguments, **options: None)  # pytest-xdist cannot hand it on
    run(wanted([provider("odd", fail_at(0, error)), PROVIDERS[BASELINE]]), results(tmp_path), device)
    row = rows(tmp_path)[CASE.name, "odd", "all"]
    assert (row["status"], row["reason"]) == ("failed", reason)
    assert rows(tmp_path)[CASE.name, BASELINE, "inference"]["status"] == "ok"


@pytest.mark.parametrize("name", ["gpu", "torch", "triton", "cudnn", "sources", "driver"])
def test_rows_of_two_machines_or_codes_do_not_mix(tmp_path, name):
    results(tmp_path).add({"case": "copy", "provider": "device", "mode": "floor", "status": "ok"})
    with pytest.raises(UsageError, match=f"with {name}"):
        Store(tmp_path / "bench_smoke.csv", machine() | {name: "another"})


def test_a_failing_floor_is_recorded(tmp_path, device, monkeypatch):
    def broken(name, device):
        raise ValueError("no such unit")

    monkeypatch.setattr(floor, "measure_floor", broken)
    run(wanted([PROVIDERS[BASELINE]]), results(tmp_path), device)
    found = rows(tmp_path)
    assert found["copy", "device", "floor"]["status"] == "failed"
    assert found[CASE.name, BASELINE, "inference"]["status"] == "ok"
    assert found[CASE.name, BASELINE, "inference"]["floor_ms"] != found[CASE.name, BASELINE, "inference"]["floor_ms"]
