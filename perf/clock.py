"""Timing: triton.testing.do_bench on a GPU, and the same code with the host's clock without one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.testing import do_bench

WARMUP_MS, REP_MS = 5, 25  # per turn; every provider has several


class _HostEvent:
    def __init__(self, enable_timing: bool = True) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: _HostEvent) -> float:
        return (end.seconds - self.seconds) * 1e3


class _HostDriver:
    """The parts of a Triton driver that do_bench uses, with the host's clock."""

    def get_device_interface(self) -> Any:
        return SimpleNamespace(Event=_HostEvent, synchronize=lambda: None)

    def get_empty_cache_for_benchmark(self) -> None:
        return None

    def clear_cache(self, cache: None) -> None:
        return None


@contextlib.contextmanager
def timing(device: torch.device) -> Iterator[None]:
    """Makes do_bench and the functions below time `device`, or the host's clock if that is the CPU."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
        return
    with patch.object(triton.runtime.driver, "_active", _HostDriver()):  # reset_active() would require a GPU
        yield


def times_ms(call: Callable[[], Any], *, clear: Any = None) -> list[float]:
    """Device times of one turn of consecutive calls, with the L2 cache flushed before each.

    clear: tensors whose .grad is set to None before each.
    """
    times: list[float] = do_bench(call, warmup=WARMUP_MS, rep=REP_MS, grad_to_none=clear, return_mode="all")
    return times


def times_after_ms(setup: Callable[[], Any], call: Callable[[Any], Any]) -> list[float]:
    """Likewise for call(setup()), excluding the time of setup, which do_bench cannot exclude."""
    driver = triton.runtime.driver.active
    interface, cache = driver.get_device_interface(), driver.get_empty_cache_for_benchmark()

    def once() -> tuple[Any, Any]:
        begin, end = (interface.Event(enable_timing=True) for _ in range(2))
        made = setup()
        driver.clear_cache(cache)
        begin.record()
        call(made)
        end.record()
        return begin, end

    once()
    begin, end = once()
    interface.synchronize()
    calls = max(1, int((WARMUP_MS + REP_MS) / max(begin.elapsed_time(end), 1e-3)))
    events = [once() for _ in range(min(calls, 1000))]
    interface.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def host_times_ms(call: Callable[[], Any]) -> list[float]:
    """Host times: from the call until it returns, with an idle device before."""
    interface = triton.runtime.driver.active.get_device_interface()
    times: list[float] = []
    begun = time.perf_counter()
    call()
    while len(times) < 3 or (len(times) < 100 and time.perf_counter() - begun < 0.1):
        interface.synchronize()
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    interface.synchronize()
    return times
