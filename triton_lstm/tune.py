"""Tuning: measures the most promising plans of a shape, checks the answer of each, and finds the fastest."""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

import triton_lstm.kernels as kernels
from triton_lstm import tables
from triton_lstm.kernels.configs import Clock, Trial, Trials
from triton_lstm.kernels.launch import launch
from triton_lstm.module import LSTM
from triton_lstm.plan import Plan, make_plan
from triton_lstm.reference import lstm_reference
from triton_lstm.table_file import Key, LayerTime, Mode, TableError, Tuned, bucket, file_name, update
from triton_lstm.tolerance import Allowance, Answer, draws

STEPS, LARGEST = 128, 1 << 26  # time steps of a trial, fewer where (T, B, 4H) would have more elements
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
log = logging.getLogger(__name__)
_one_at_a_time = threading.RLock()
_tried: set[Key] = set()  # by first calls; a failure is not repeated at every one


def gpu_clock(call: Callable[[], Any], quantiles: tuple[float, ...]) -> list[float]:
    """ms of a call at each quantile."""
    from triton.testing import do_bench

    times: list[float] = do_bench(call, warmup=10, rep=50, quantiles=list(quantiles))
    return times


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
    facts, itemsize = kernels.device_facts(device), kernels.bytes_on_chip(DTYPES[key.dtype], device)
    plans = {backward: make_plan(facts, itemsize, key.B, key.H, backward) for backward in (False, True)}
    if not plans[key.backward].one_launch:
        return [Trial(plans[key.backward], math.nan, reason="its programs do not fit the GPU at once")]
    steps = max(4, min(steps, LARGEST // (key.B * 4 * key.H)))
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[key.dtype]

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    w_hh = draw(4 * key.H, key.H, scale=key.H**-0.5)
    data = [
        {
            "xg": draw(steps, key.B, 4 * key.H),
            "h0": draw(key.B, key.H, scale=0.5),
            "c0": draw(key.B, key.H),
            "dy": draw(steps, key.B, key.H),
            "w_hh": w_hh,
        }
        for _ in range(draws(steps * key.B * key.H))
    ]
    exact, same = ([_answer(d, wide, key.backward) for d in data] for wide in (torch.float64, dtype))
    allowance = Allowance(exact, same, tf32=key.dtype == "tf32")
    places = {"dgates": "dgates_ptr", "dc0": "dc_ptr"} if key.backward else {"y": "y_ptr", "c_n": "c_ptr"}

    def wrong(arguments: dict[str, Any]) -> str | None:
        for name, place in places.items():
            share = allowance.share(name, arguments[place])
            if share > 1:
                return f"its {name} has {share:.3g} times the error that is allowed"
        return None

    trials = Trials(clock, wrong, begin, again)
    chosen = data[allowance.draw]
    xg, h0, c0 = chosen["xg"], chosen["h0"], chosen["c0"].to(kernels.accumulator(dtype))
    run = launch if key.backward else trials
    _, _, c_all = kernels.lstm_forward(xg, w_hh, h0, c0, plan=plans[False], reverse=False, save=True, run=run)
    if not key.backward:
        return trials.trials
    assert c_all is not None  # and xg holds the gates
    kernels.lstm_backward(chosen["dy"], None, None, w_hh, c0, xg, c_all, plan=plans[True], reverse=False, run=trials)
    return trials.trials


def _answer(data: dict[str, torch.Tensor], dtype: torch.dtype, backward: bool) -> Answer:
    """What the kernels should say, by the reference in `dtype`."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(data["xg"].device.type, enabled=False):
        xg, h0, c0, w_hh, dy = (data[name].to(dtype, copy=True) for name in ("xg", "h0", "c0", "w_hh", "dy"))
        if backward:
            xg.requires_grad_()
            c0.requires_grad_()
        y, _, c_n = lstm_reference(xg, h0, c0, None, w_hh)
        if not backward:
            return {"y": y, "c_n": c_n}
        return dict(zip(("dgates", "dc0"), torch.autograd.grad(y, (xg, c0), dy), strict=True))


def best(key: Key, trials: list[Trial]) -> Tuned | None:
    """The fastest plan; None where not even the planned one could be measured, and nothing is known of a gain."""
    measured = [trial for trial in trials if math.isfinite(trial.us)]
    if not measured or trials[0] not in measured:
        return None
    fastest = min(measured, key=lambda trial: trial.us)
    return Tuned(key, fastest.plan, fastest.us, trials[0].us)


def layer_times(
    dtype: str, hidden_size: int, batch: int, device: torch.device, clock: Clock = gpu_clock, steps: int = STEPS
) -> list[LayerTime]:
    """A whole layer by the kernels and by PyTorch's own path."""
    steps = max(4, min(steps, LARGEST // (batch * 4 * hidden_size)))
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
    return [LayerTime(m, dtype, hidden_size, batch, times[m, "triton"], times[m, "torch"]) for m in modes]


def tune_now(key: Key, device: torch.device) -> None:
    """Tunes a key in the middle of a call, for this process and, where it can be written, the user's table."""
    key = Key(key.backward, key.dtype, key.H, bucket(key.B))
    facts = kernels.device_facts(device)
    with _one_at_a_time:
        if key in _tried:
            return
        _tried.add(key)
        log.info("tuning %s for %s", key, facts.name)
        found = best(key, measure(key, device))
        if found is None:
            return
        tables.remember(facts.name, found)
        folder = tables.user_folder()
        if folder is None:
            return
        try:
            update(folder / file_name(facts.name), about(device), found)
        except (OSError, TableError) as error:
            warnings.warn(f"what was tuned is known to this process only: {error}", stacklevel=2)


def about(device: torch.device) -> dict[str, str]:
    """Where times are from."""
    from triton_lstm.perf.machine import machine, now

    return {name: str(value) for name, value in machine().items() if name != "sources"} | {"date": now()}
