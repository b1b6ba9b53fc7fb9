"""What `python -m triton_lstm.perf.step --measured` compares, with stand-ins for the compiler and the model."""

import dataclasses
from types import SimpleNamespace

import pytest
from tuned import FORWARD

from triton_lstm.perf.step import measured
from triton_lstm.planning.devices import GPUS
from triton_lstm.planning.space import make_plan
from triton_lstm.tuning.table_file import Table, Tuned

H200 = GPUS["H200"]


@pytest.fixture
def compared(monkeypatch, tmp_path):
    """What `compare` gives with one tuned time loop, and these lines of a benchmark."""
    step = SimpleNamespace(us=lambda waiting: 5.0 if waiting else 0.0, waiting=True)
    seen = []
    monkeypatch.setattr(measured, "modelled", lambda problem, plan, constants: seen.append(plan) or [step])
    monkeypatch.setattr(measured, "compile_exchange", lambda *args: SimpleNamespace(asm={"cubin": args[1:]}))
    monkeypatch.setattr(measured, "disassemble", lambda cubin: ("", "", cubin))
    monkeypatch.setattr(
        measured, "model_step", lambda code, loop, constants: seen.append((code, loop.programs)) or step
    )
    plan = make_plan(FORWARD.on(H200))
    table = Table({})
    table.add(Tuned(FORWARD, dataclasses.replace(plan, block_k=2 * plan.block_k), 3.0, 4.0, ""))
    monkeypatch.setattr(measured, "table_for", lambda name: table)
    monkeypatch.setattr(measured, "RESULTS", tmp_path)

    def call(rows):
        folder = tmp_path / "nvidia_h200"
        folder.mkdir()
        (folder / "bench_quick.csv").write_text("\n".join(["case,us_per_step", *rows]))
        return list(measured.compare(H200, None)), seen

    return call


def test_what_was_measured_is_beside_what_is_modelled(compared):
    found, seen = compared(["exchange-flag-48,1.5", "exchange-barrier-16,", "fp16-T4-B4-I8-H8,9.0"])
    assert [f.measured for f in found[:2]] == [4.0, 3.0]
    assert [f.name for f in found[:2]] == [f"bf16 H=24 B=16 forward {plan}" for plan in seen[:2]]
    assert found[2:] == [("exchange-flag-48", 1.5, 5.0)] and all(f.modelled == 5.0 for f in found)
    assert seen[-1] == ((48, "flag"), 48)
