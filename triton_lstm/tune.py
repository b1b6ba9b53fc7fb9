"""Tuning: measures the most promising plans of a shape, checks the answer of each, and finds the fastest."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from triton.testing import do_bench

import triton_lstm.kernels as kernels
from triton_lstm import tables
from triton_lstm.kernels.configs import Clock, Trial, Trials, compile_best
from triton_lstm.kernels.launch import Turns
from triton_lstm.module import LSTM
from triton_lstm.perf.cases import DTYPES
from triton_lstm.plan import Plan, make_plan
from triton_lstm.reference import lstm_steps
from triton_lstm.table_file import Key, LayerTime, Mode, TableError, Tuned, bucket, file_name, update
from triton_lstm.tolerance import Allowance, Answer, draws

STEPS, LARGEST = 128, 1 << 26  # time steps of a trial, fewer where (T, B, 4H) would have more elements
Data = dict[str, torch.Tensor]
log = logging.getLogger(__name__)
_turns = Turns()
_tried: set[tuple[str, Key]] = set()  # by first calls, on which GPU; a failure is not repeated at every one


def gpu_clock(call: Callable[[], Any], quantiles: tuple[float, ...]) -> list[float]:
    """ms of a call at each quantile."""
    times = do_bench(call, warmup=10, rep=50, quantiles=list(quantiles))
    return times if isinstance(times, list) else [times]  # of a single quantile it makes a number


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

    key.B is a bucket. float32 is measured as PyTorch's switches for TF32 stand. clock, begin, again: see Trials.
    """
    facts = kernels.device_facts(device)
    plan = make_plan(facts, facts.itemsize(key.dtype), key.B, key.H, key.backward)
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
    """Compiles the kernels that `measure` will measure, and runs none of them."""
    facts = kernels.device_facts(device)
    plan = make_plan(facts, facts.itemsize(key.dtype), key.B, key.H, key.backward)
    if plan.one_launch:
        _launch(key, _draw(key, DTYPES[key.dtype], 2, device)[0], plan, compile_best)


def _launch(key: Key, data: Data, plan: Plan, run: Callable[..., None]) -> None:
    device, dtype = data["xg"].device, data["xg"].dtype
    w_hh, c0 = data["w_hh"][None], data["c0"].to(kernels.accumulator(dtype))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if key.backward:
            saved = _answer(data, c0.dtype, backward=False)
            gates, c_all = saved["gates"].to(dtype), saved["c_all"]
            kernels.lstm_backward(data["dy"], None, None, w_hh, c0, gates, c_all, plan=plan, run=run)
        else:
            kernels.lstm_forward(data["xg"], w_hh, data["h0"], c0, plan=plan, save_gates=True, save_c=True, run=run)


def _steps(most: int, batch: int, hidden_size: int) -> int:
    return max(4, min(most, LARGEST // (batch * 4 * hidden_size)))


def _draw(key: Key, dtype: torch.dtype, steps: int, device: torch.device) -> list[Data]:
    """Random data, as often as the tolerance wants it, without touching PyTorch's own generators."""
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
    """What the kernels should store, by the reference in `dtype`, under the names of their arguments."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(data["xg"].device.type, enabled=False):
        xg, h0, c0, w_hh, dy = (data[name].to(dtype, copy=True) for name in ("xg", "h0", "c0", "w_hh", "dy"))
        if backward:
            xg.requires_grad_()
            c0.requires_grad_()
        gates, c_all, y = map(torch.stack, zip(*lstm_steps(xg.unbind(0), h0, c0, None, w_hh), strict=True))
        if not backward:
            return {"y": y, "gates": gates, "c_all": c_all, "c": c_all[-1]}
        return dict(zip(("dgates", "dc"), torch.autograd.grad(y, (xg, c0), dy), strict=True))


def best(key: Key, trials: list[Trial], measured: str = "") -> Tuned | None:
    """The fastest plan; None where none could be measured. measured: with what, and when."""
    times = [trial for trial in trials if math.isfinite(trial.us)]
    if not times:
        return None
    fastest = min(times, key=lambda trial: trial.us)
    return Tuned(key, fastest.plan, fastest.us, trials[0].us if trials[0] in times else None, measured)


def layer_times(
    dtype: str, hidden_size: int, batch: int, device: torch.device, clock: Clock = gpu_clock, steps: int = STEPS
) -> list[LayerTime]:
    """A whole layer by the kernels and by PyTorch's own path; gradients are of the input and of all weights."""
    steps = _steps(steps, batch, hidden_size)
    times: dict[tuple[Mode, str], float] = {}
    torch_dtype = DTYPES[dtype]
    x = torch.randn(steps, batch, hidden_size, device=device).to(torch_dtype)
    dy = torch.randn_like(x)
    for backend in ("triton", "torch"):
        module = LSTM(hidden_size, hidden_size, backend=backend).to(device, torch_dtype)

        def inference(module: LSTM = module) -> None:
            with torch.no_grad():
                module.eval()(x)

        def training(module: LSTM = module) -> None:
            module.train()(x.requires_grad_())[0].backward(dy)
            module.zero_grad()
            x.grad = None

        calls: dict[Mode, Callable[[], None]] = {"inference": inference, "training": training}
        for mode, call in calls.items():
            times[mode, backend] = clock(call, quantiles=(0.5,))[0] * 1e3 / steps
    modes: tuple[Mode, ...] = ("inference", "training")
    when = provenance()
    return [LayerTime(m, dtype, hidden_size, batch, times[m, "triton"], times[m, "torch"], when) for m in modes]


def tune_now(key: Key, device: torch.device) -> None:
    """Tunes a key in the middle of a call, for this process and, where it can be written, the user's table."""
    key = Key(key.backward, key.dtype, key.H, bucket(key.B))
    facts = kernels.device_facts(device)
    if (facts.name, key) in _tried:
        return
    with _turns.taken():
        if (facts.name, key) in _tried:
            return
        _tried.add((facts.name, key))
        log.info("tuning %s for %s", key, facts.name)
        try:
            found = best(key, measure(key, device), provenance())
        except Exception as error:  # the call itself can do without
            warnings.warn(f"{key} could not be tuned, and runs as planned: {error!r}", stacklevel=2)
            return
        if found is None:
            return
        tables.remember(facts.name, found)
        try:
            folder = tables.user_folder()
            if folder is None:
                return
            update(folder / file_name(facts.name), facts.name, found)
        except (OSError, TableError) as error:
            warnings.warn(f"what was tuned is known to this process only: {error}", stacklevel=2)


def provenance() -> str:
    """What times are measured with, and when: the date in UTC."""
    from triton_lstm.perf.machine import machine, now

    facts = machine()
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "cudnn", "driver") if facts[name])
    return f"{versions}, {now()[:10]}"
