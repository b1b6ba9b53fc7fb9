"""Tables of the test's own, and tuning without a GPU: the concurrent interpreter and a clock that the test sets."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from triton_lstm.planning.devices import GPUS, file_name
from triton_lstm.planning.plan import Plan
from triton_lstm.tuning import tables
from triton_lstm.tuning.choice import forget
from triton_lstm.tuning.table_file import Key, LayerTime, Tuned, update

H200 = GPUS["H200"]
PLAN = Plan("barrier", True, True, 16, 32, 128, 1, 1, 8)
KEY = Key(False, "bf16", 512, 64)
ENTRY = Tuned(KEY, PLAN, 1.25, 1.5)
LAYER = LayerTime("inference", "bf16", 512, 64, 2.0, 3.0)
FORWARD, BACKWARD = Key(False, "bf16", 24, 16), Key(True, "bf16", 24, 16)


@pytest.fixture
def tables_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the user's tables lie; nothing is shipped."""
    monkeypatch.setenv(tables.FOLDER, str(tmp_path))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    forget()
    yield tmp_path
    forget()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tables_folder: Path, interpreter: None) -> Iterator[None]:
    """Plans are an H200's; the programs of a launch run concurrently."""
    pytest.importorskip("greenlet")
    from interleave import concurrent_programs

    for module in ("kernels.configs", "kernels", "tuning.first_call"):
        monkeypatch.setattr(f"triton_lstm.{module}.device_facts", lambda device: H200)
    monkeypatch.setattr("triton_lstm.tuning.first_call.provenance", lambda: "today")
    monkeypatch.setattr("triton_lstm.tuning.first_call._tried", set())
    with concurrent_programs(seed=0):
        yield


def put(folder: Path, *entries: Tuned | LayerTime, gpu: str = "H200") -> Path:
    """A table of these in the folder, for a GPU by its short name."""
    path = folder / file_name(GPUS[gpu].name)
    update(path, GPUS[gpu].name, *entries)
    forget()
    return path


class Clock:
    """ms by a function of the plan, which `begin` tells."""

    def __init__(self, ms: Callable[[Plan], float] = lambda plan: 1.0) -> None:
        self.ms = ms
        self.begun: list[Plan] = []

    def begin(self, plan: Plan) -> None:
        self.begun.append(plan)

    def __call__(self, call: Callable[[], Any], quantiles: tuple[float, ...]) -> list[float]:
        call()
        return [self.ms(self.begun[-1])] * len(quantiles)
