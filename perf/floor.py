"""Micro-benchmarks of the device: one exchange of h, a copy, a matmul. The floor of a case is computed from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch

from triton_lstm.kernels import device_facts
from triton_lstm.perf.clock import times_ms, timing
from triton_lstm.perf.exchange_loop import ExchangeLoop
from triton_lstm.perf.results import DEVICE
from triton_lstm.perf.work import Floors
from triton_lstm.planning.plan import Exchange
from triton_lstm.settings import DTYPES, switches

MODE = "floor"
STEPS = 2000  # per exchange benchmark on a GPU
REGISTER_BYTES = 4 * 65536  # per SM, on every NVIDIA GPU since 2014
PROGRAMS = (2, 4, 8, 16, 32, 64, 128, 192)  # up to the number of SMs
Row = dict[str, Any]


def floor_names(device: torch.device) -> list[str]:
    """The rows that `measure_floor` supports: copy, matmul-<precision>, exchange-<kind>-<programs>."""
    gpu = device.type == "cuda"
    programs = [n for n in PROGRAMS if n <= device_facts(device).processors] if gpu else [2]
    kinds = ("barrier",) if device_facts(device).backend == "hip" else ("flag", "barrier")
    return [
        "copy",
        *(f"matmul-{precision}" for precision in ("fp16", "bf16", "tf32", "fp32")),
        *(f"exchange-{kind}-{n}" for kind in kinds for n in programs),
    ]


def measure_floor(name: str, device: torch.device) -> Row:
    """One row of the frame: gbs of a copy, tflops of a matmul, us_per_step of an exchange."""
    measure: dict[str, Callable[..., Row]] = {"copy": _copy, "matmul": _matmul, "exchange": _exchange}
    what, *arguments = name.split("-")
    row: Row = {"case": name, "provider": DEVICE, "mode": MODE, "status": "ok", "why": "the floor"}
    with timing(device):
        return row | measure[what](device, *arguments)


def _copy(device: torch.device) -> Row:
    """1 GiB on a GPU: much larger than its caches."""
    source = torch.zeros((1 << 30 if device.type == "cuda" else 1 << 20) // 4, device=device)
    target = torch.empty_like(source)
    ms, row = _time(lambda: target.copy_(source))
    return row | {"gbs": 2 * source.nbytes / ms / 1e6}


def _matmul(device: torch.device, precision: str) -> Row:
    n = 8192 if device.type == "cuda" else 64
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[precision]) for _ in range(2))
    with switches(precision):
        ms, row = _time(lambda: a @ b)
    return row | {"tflops": 2 * n**3 / ms / 1e9}


def _exchange(device: torch.device, kind: Exchange, programs: str) -> Row:
    gpu = device.type == "cuda"
    loop = ExchangeLoop(int(programs), STEPS if gpu else 3, kind, device, one_launch=gpu)
    loop.run()
    if not loop.complete():
        return {"status": "wrong", "reason": "a value did not arrive"}
    ms, row = _time(loop.run)
    if not loop.complete():  # before prepare refills the buffer
        return {"status": "wrong", "reason": "a value did not arrive while it was timed"}
    ms -= _time(loop.prepare)[0]
    return row | {"us_per_step": ms * 1e3 / (loop.steps - 1)}  # the first step waits for nothing


def _time(call: Callable[[], Any]) -> tuple[float, Row]:
    times = pd.Series(times_ms(call))
    p20, ms, p80 = times.quantile([0.2, 0.5, 0.8])
    return float(ms), {"ms": ms, "p20": p20, "p80": p80, "runs": len(times)}


def floors_of(frame: pd.DataFrame, device: torch.device) -> Floors:
    """The floors from the measured rows; NaN or empty where there is no measurement."""
    facts = device_facts(device)
    rows = frame[(frame["provider"] == DEVICE) & (frame["status"] == "ok")].set_index("case")
    exchange: dict[int, float] = {}
    for name, us in rows["us_per_step"].dropna().items():
        programs = int(str(name).rpartition("-")[2])
        exchange[programs] = min(us, exchange.get(programs, math.inf))
    tflops = {p: float(rows["tflops"].get(f"matmul-{p}", math.nan)) for p in DTYPES}
    tflops["fp32"] = max(tflops["fp32"], tflops["tf32"] / 3)  # three tf32 matmuls give float32 precision
    on_chip = facts.shared_bytes + REGISTER_BYTES
    return Floors(float(rows["gbs"].get("copy", math.nan)), tflops, exchange, facts.processors, on_chip)
