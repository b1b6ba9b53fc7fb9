"""Fake providers and runs for the tests of the benchmarks."""

import pytest
from torch import nn

from triton_lstm.perf import floor
from triton_lstm.perf.cases import Case
from triton_lstm.perf.providers import Provider
from triton_lstm.perf.results import load
from triton_lstm.perf.store import Store
from triton_lstm.system.machine import machine

CASE = Case("fp32", T=2, B=2, H=4, modes=("inference", "forward_backward"), why="a test")
OTHER = Case("fp32", T=3, B=2, H=4, modes=("inference",), why="another")


@pytest.fixture
def short_floors(monkeypatch):
    """Two floors instead of all."""
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
    return Store(path / "bench_smoke.csv", machine())


def rows(path):
    frame = load([path / "bench_smoke.csv"])
    return {(row["case"], row["provider"], row["mode"]): row for _, row in frame.iterrows()}
