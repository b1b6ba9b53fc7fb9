"""With a simulated GPU: the results folder, cuDNN's algorithms, the rows of a stress test."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from triton_lstm.cli import machine as cli_machine
from triton_lstm.cli import warm
from triton_lstm.perf import failures, stress
from triton_lstm.perf.cases import SUITES
from triton_lstm.perf.cudnn import algorithm_name
from triton_lstm.perf.store import results_folder
from triton_lstm.planning.devices import GPUS
from triton_lstm.planning.problem import Problem
from triton_lstm.planning.space import make_plan
from triton_lstm.system import machine
from triton_lstm.tuning.tables import SHIPPED

GPU = torch.cuda.is_available()


@pytest.mark.parametrize(
    "bad, status", [({}, 0), ({"wrong_forward": 1}, 1), ({"wrong_backward": 1}, 1), ({"failed": "boom"}, 1)]
)
def test_stress_writes_every_row(tmp_path, monkeypatch, capsys, bad, status):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "machine", lambda: {"gpu": "Imaginary"})
    monkeypatch.setattr(stress, "stress", lambda small: iter([{"exchange": "flag", "wrong_forward": 0}, bad]))
    monkeypatch.setattr(sys, "argv", ["stress", "--small", "--out", str(tmp_path / "new" / "stress.csv")])
    assert stress.main() == status
    assert len(pd.read_csv(tmp_path / "new" / "stress.csv")) == 2


def test_only_a_device_that_splits_no_sums_skips_a_case(monkeypatch):
    monkeypatch.setattr(stress.warnings, "simplefilter", lambda kind: None)
    for error, column in ((stress.NoSplitError("too small"), "skipped"), (KeyError("H"), "failed")):

        def raises(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(stress, "stress_case", raises)
        assert all(row[column] for row in stress.stress(small=True))


@pytest.mark.parametrize("value, far", [(1.0, False), (1.001, False), (1.1, True), (float("nan"), True)])
def test_split_sums_are_near_those_that_are_not(value, far):
    assert bool(stress._far((torch.full((3,), value),), (torch.ones(3),), 2**-8)) is far


def test_the_machine_on_a_gpu(monkeypatch):
    lines = "580.1, GPU-aaaa\n580.2, GPU-bbbb\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (x)")
    monkeypatch.setattr(machine.shutil, "which", lambda name: name)
    monkeypatch.setattr(machine, "_output", lambda command: lines)
    for uuid, expected in [("bbbb", "580.2"), ("unknown", None)]:
        properties = SimpleNamespace(uuid=uuid)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, p=properties: p)
        assert machine._nvidia_smi("driver_version") == expected
    assert results_folder() == Path("perf/results/nvidia_h200_x")


@pytest.mark.parametrize("said, expected", [("1980", "1980.0"), ("[N/A]", "nan"), (None, "nan")])
def test_the_clock(said, expected, monkeypatch):
    monkeypatch.setattr(machine, "_nvidia_smi", lambda field: said)
    assert str(machine.clock_mhz()) == expected


def test_a_program_that_is_not_there_says_nothing():
    assert machine._output(["no-such-program-here"]) is None and machine._output(["false"]) is None


def test_the_provenance_of_a_measurement(monkeypatch):
    facts = {"torch": "2.13.0", "triton": "3.7.1", "cudnn": None, "driver": ""}
    monkeypatch.setattr(machine, "machine", lambda: facts)
    monkeypatch.setattr(machine, "now", lambda: "2026-11-27T10:00:00")
    assert machine.provenance() == "torch 2.13.0, triton 3.7.1, 2026-11-27"


@pytest.mark.parametrize("arguments", [[], ["here/too"], ["--table"]])
def test_where_the_results_of_a_gpu_go(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (x)")
    assert cli_machine.main(arguments) == 0
    printed = Path(capsys.readouterr().out.strip())
    if arguments == ["--table"]:
        assert printed == SHIPPED / "nvidia_h200_x.json" and not list(tmp_path.iterdir())
    else:
        assert printed == Path(*arguments or ["perf/results/nvidia_h200_x"]) and printed.is_dir()


def test_what_is_timed_on_a_gpu_is_compiled_before(monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(warm, "compile_all", lambda jobs: compiled.extend(jobs) or len(compiled))
    monkeypatch.setattr(warm, "device_for", lambda: torch.device("cpu"))
    arguments = ["--suite", "smoke", "--hidden", "64", "--batch", "16", "--dtype", "bf16"]
    monkeypatch.setattr(sys, "argv", ["warm", *arguments])
    assert warm.main() == 0 and len(compiled) > 4
    assert capsys.readouterr().out == f"precompiled: {len(compiled)} of {len(compiled)} loops and cases\n"


def test_the_algorithm_of_nn_lstm(monkeypatch):
    case = SUITES["quick"]()[0]
    assert GPU or algorithm_name(case, "inference") == "CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    small = dataclasses.replace(case, H=192)
    assert algorithm_name(case, "forward_backward") == algorithm_name(case, "inference") == "PERSIST_STATIC"
    assert [
        algorithm_name(small, m) for m in ("forward", "backward", "forward_backward", "host_inference", "graph_step")
    ] == [
        "SMALL_H",
        "STANDARD",
        "SMALL_H / STANDARD",
        "SMALL_H",
        "SMALL_H / STANDARD",
    ]
    bf16 = dataclasses.replace(case, precision="bf16")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    assert algorithm_name(bf16, "forward") == "STANDARD, copies weights"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91200)
    assert algorithm_name(bf16, "forward") == "step by step"


def test_a_gpu_that_is_lost_is_named(monkeypatch):
    def zeros(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    monkeypatch.setattr(torch, "zeros", zeros)
    failures.device_still_there(torch.device("cpu"))
    with pytest.raises(failures.DeviceLostError, match=r"^CUDA error: an illegal memory access$"):
        failures.device_still_there(torch.device("cuda", 0))


def test_nn_lstm_on_amd(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert algorithm_name(SUITES["quick"]()[0], "inference") == "MIOpen"


def test_a_stress_test_of_split_sums():
    large, small = Problem(GPUS["H200"], "bf16", 16, 768, True), Problem(GPUS["H200"], "bf16", 16, 16, True)
    assert stress._split(make_plan(large), large).splits > 1
    with pytest.raises(stress.NoSplitError, match="cannot split these sums"):
        stress._split(make_plan(small), small)
