"""Tuning: measures the most promising plans of a shape, checks the results of each, and finds the fastest."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from triton.testing import do_bench

import triton_lstm.kernels as kernels
from triton_lstm.core.reference import lstm_steps
from triton_lstm.core.tolerance import Allowance, Answer, draws
from triton_lstm.kernels.configs import Clock, Trial, Trials, compile_best
from triton_lstm.planning.plan import Plan
from triton_lstm.planning.space import make_plan
from triton_lstm.settings import DTYPES
from triton_lstm.tuning.table_file import Key, Tuned

STEPS, LARGEST = 128, 1 << 26  # time steps per trial, fewer where (T, B, 4H) would have more elements
Data = dict[str, torch.Tensor]


def gpu_clock(call: Callable[[], Any], quantiles: tuple[float, ...]) -> list[float]:
    """ms of a call at each quantile."""
    times = do_bench(call, warmup=10, rep=50, quantiles=list(quantiles))
    return times if isinstance(times, list) else [times]  # for a single quantile it returns a number


def measure(
    key: Key,
    device: torch.device,
    *,
    clock: Clock = gpu_clock,
    steps: int = STEPS,
    begin: Callable[[Plan], str | None] = lambda plan: None,
    again: bool = False,
) -> list[Trial]:
    """Every config for a key, with its time or the reason why it has none; the planned one first.

    float32 is measured with PyTorch's current TF32 switches. clock, begin, again: see Trials.
    """
    plan = make_plan(key.on(kernels.device_facts(device)))
    if not plan.one_launch:
        return [Trial(plan, math.nan, reason="its programs do not fit the GPU at once")]
    dtype = DTYPES[key.dtype]
    data = _draw(key, dtype, _steps(steps, key.B, key.H), device)
    exact, same = ([_answer(d, wide, key.backward) for d in data] for wide in (torch.float64, dtype))
    allowance = Allowance(exact, same, tf32=key.dtype == "tf32")

    def wrong(arguments: dict[str, Any]) -> str | None:
        for name in exact[0]:
            share = allowance.share(name, arguments[f"{name}_ptr"])
            if share > 1:
                return f"its {name} has {share:.3g} times the error that is allowed"
        return None

    trials = Trials(clock, wrong, begin, again)
    _launch(key, data[allowance.draw], plan, trials)
    return trials.trials


def compile_ahead(key: Key, device: torch.device) -> None:
    """Compiles the kernels that `measure` will measure, without running them."""
    plan = make_plan(key.on(kernels.device_facts(device)))
    if plan.one_launch:
        _launch(key, _draw(key, DTYPES[key.dtype], 2, device)[0], plan, compile_best)


def _launch(key: Key, data: Data, plan: Plan, run: Callable[..., None]) -> None:
    device, dtype = data["xg"].device, data["xg"].dtype
    w_hh, h0, c0 = data["w_hh"], data["h0"][None], data["c0"][None].to(kernels.accumulator(dtype))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if key.backward:
            saved = _answer(data, c0.dtype, backward=False)
            gates, c_all = saved["gates"].to(dtype), saved["c_all"]
            kernels.lstm_backward(data["dy"], None, None, w_hh, c0, gates, c_all, plan=plan, run=run)
        else:
            kernels.lstm_forward(data["xg"], w_hh, h0, c0, plan=plan, save_gates=True, save_c=True, run=run)


def _steps(most: int, batch: int, hidden_size: int) -> int:
    return max(4, min(most, LARGEST // (batch * 4 * hidden_size)))


def _draw(key: Key, dtype: torch.dtype, steps: int, device: torch.device) -> list[Data]:
    """As many sets of random data as the tolerance needs, without touching PyTorch's global generators."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    w_hh = draw(4 * key.H, key.H, scale=key.H**-0.5)
    return [
        {
            "xg": draw(steps, key.B, 4 * key.H),
            "h0": draw(key.B, key.H, scale=0.5),
            "c0": draw(key.B, key.H),
            "dy": draw(steps, key.B, key.H),
            "w_hh": w_hh,
        }
        for _ in range(draws(steps * key.B * key.H))
    ]


def _answer(data: Data, dtype: torch.dtype, backward: bool) -> Answer:
    """What the kernels should store, computed by the reference in `dtype`, by the names of their arguments."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(data["xg"].device.type, enabled=False):
        xg, h0, c0, w_hh, dy = (data[name].to(dtype, copy=True) for name in ("xg", "h0", "c0", "w_hh", "dy"))
        if backward:
            xg.requires_grad_()
            c0.requires_grad_()
        gates, c_all, y = map(torch.stack, zip(*lstm_steps(xg.unbind(0), h0, c0, None, w_hh), strict=True))
        if not backward:
            return {"y": y, "gates": gates, "c_all": c_all, "c": c_all[-1:]}
        dgates, dc = torch.autograd.grad(y, (xg, c0), dy)
        return {"dgates": dgates, "dc": dc[None]}


def best(key: Key, trials: list[Trial], measured: str = "") -> Tuned | None:
    """The fastest plan; None where none could be measured. measured: with which versions, and when."""
    times = [trial for trial in trials if math.isfinite(trial.us)]
    if not times:
        return None
    fastest = min(times, key=lambda trial: trial.us)
    return Tuned(key, fastest.plan, fastest.us, trials[0].us if trials[0] in times else None, measured)
