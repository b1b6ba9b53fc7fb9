"""Compiled kernels on an emulated GPU: run by test_emulated.py, or by PTX_GPU=H100 pytest tests/ptx/emulated.py."""

import dataclasses
import os

import pytest
import torch
from compiled import EMULATED
from oracle import assert_like_nn_lstm, state_shapes
from segments_alone import alone

import triton_lstm
from triton_lstm.core.tolerance import enlarge
from triton_lstm.perf.exchange_loop import ExchangeLoop
from triton_lstm.planning.plan import Plan

from .faults import Fault
from .gpu import gpu
from .schedule import Schedule

if not EMULATED:
    pytest.skip("PTX_GPU names no GPU", allow_module_level=True)
SEED, WEAK = int(os.environ.get("PTX_SEED", 0)), os.environ.get("PTX_WEAK") == "1"
SEEDS = range(SEED, SEED + int(os.environ.get("PTX_SEEDS", 1)))  # how many schedules of what depends on it
FLAG = Plan("flag", True, True, 16, 16, 64, 1, 1, 4)
SLICES = dataclasses.replace(FLAG, block_h=8, slices=4)
BARRIER = dataclasses.replace(SLICES, exchange="barrier")
ALONE = Plan("none", True, True, 16, 32, 32, 1, 1, 4)
SPLIT = Plan("flag", True, True, 16, 16, 64, 4, 1, 4, splits=2)
SPLITS = {
    "flag 2": SPLIT,
    "flag 4": dataclasses.replace(SPLIT, block_h=32, block_k=32, slices=1, splits=4),
    "flag 8": dataclasses.replace(SPLIT, block_h=32, block_k=16, slices=1, splits=8, warps=2),  # half of a gate each
    "barrier 2": dataclasses.replace(SPLIT, exchange="barrier", slices=1),
    "barrier 4": dataclasses.replace(SPLIT, exchange="barrier", block_h=32, splits=4),
}
WGMMA = Plan("flag", True, True, 64, 32, 64, 1, 1, 4)  # on Hopper


def like_nn_lstm(H, T=3, B=3, dtype=torch.bfloat16, states=True, resets=None, **kwargs):
    torch.manual_seed(SEED)
    module = enlarge(triton_lstm.LSTM(4, H, backend="triton", **kwargs)).to(dtype)

    def draw():
        x = torch.randn(T, B, 4).to(dtype)
        return x, tuple(torch.randn(s).to(x) for s in state_shapes(module, B)) if states else None

    if resets is not None:
        kwargs |= dict(ours=lambda module, x, hx: module(x, hx, resets=resets))
        kwargs |= dict(theirs=lambda module, x, hx: alone(module, x, hx, resets))
    assert_like_nn_lstm(module, draw, **kwargs)


@pytest.fixture
def takes(monkeypatch):
    """Has all layers take a plan."""

    def take(plan, backward=None):
        plans = plan, backward or plan
        monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: plans[backward])

    return take


@pytest.mark.parametrize("H, B, dtype", [(48, 3, torch.float32), (50, 17, torch.float16), (96, 2, torch.bfloat16)])
def test_the_plan_of_this_gpu(H, B, dtype):
    like_nn_lstm(H, B=B, dtype=dtype)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("plan", [FLAG, SLICES, BARRIER], ids=["flag", "slices", "barrier"])
def test_several_programs(plan, seed, takes):
    takes(plan)
    with gpu(EMULATED, seed=seed, weak=WEAK):
        like_nn_lstm(64)


@pytest.mark.parametrize("plan", SPLITS)
def test_a_sum_split_among_programs(plan, takes):
    takes(ALONE, SPLITS[plan])
    with gpu(EMULATED, seed=SEED, weak=WEAK):
        for _ in range(1 if plan == "flag 8" else 2):  # schedules
            like_nn_lstm(32, T=5)


def test_a_split_sum_in_float32(takes):
    takes(ALONE, SPLIT)
    like_nn_lstm(32, T=5, dtype=torch.float32)


def test_a_split_sum_of_several_tiles_and_both_directions(takes):
    """And the last program has no unit."""
    takes(ALONE, dataclasses.replace(SPLIT, block_h=8, slices=1, warps=2))
    like_nn_lstm(12, T=4, B=20, bidirectional=True)


SEGMENTS = {
    "alone": (ALONE, ALONE),
    "flag": (SLICES, FLAG),
    "barrier": (BARRIER, BARRIER),
    "split": (dataclasses.replace(FLAG, one_launch=False), SPLIT),
}


@pytest.mark.parametrize("plans", SEGMENTS)
def test_segments(plans, takes):
    """Two batch tiles: all rows of the first one begin a segment at step 1, so that nobody waits for step 0."""
    takes(*SEGMENTS[plans])
    resets = torch.zeros(4, 18, dtype=torch.bool)
    resets[1, :16] = resets[2, [3, 17]] = True
    with gpu(EMULATED, seed=SEED, weak=WEAK):
        like_nn_lstm(32, T=4, B=18, resets=resets, bidirectional=plans == "flag")


@pytest.mark.parametrize("limit", ["0", "1000000"])
def test_the_look_and_the_product_have_the_same_threads(limit, takes, monkeypatch):
    """Another thread than the one that saw a row complete may still see the sentinel: it must be no other."""
    monkeypatch.setenv("TRITON_LSTM_SPIN_LIMIT", limit)
    takes(SLICES)
    for seed in (1, 30):  # where it was another one, these gave NaN
        with gpu(EMULATED, schedule=Schedule(seed, weak=True)):
            like_nn_lstm(64, T=4)


def test_tiles_for_wgmma(takes):
    takes(WGMMA)
    like_nn_lstm(64, T=2)


def test_weights_streamed(takes):
    takes(dataclasses.replace(FLAG, resident=False, block_k=32, slices=2))
    like_nn_lstm(64, T=2)


def test_tiles_in_turn_and_both_directions(takes):
    takes(dataclasses.replace(FLAG, block_h=32, groups=1))
    like_nn_lstm(48, T=2, B=20, bidirectional=True)


def test_step_by_step(takes):
    takes(dataclasses.replace(FLAG, one_launch=False))
    like_nn_lstm(40, T=2)


def test_a_misaligned_pointer(takes):
    """Another kernel is compiled, whose loads are narrower."""
    takes(FLAG)
    torch.manual_seed(0)
    module = triton_lstm.LSTM(4, 32, backend="triton", dtype=torch.bfloat16)
    states = [torch.randn(32 + k).to(torch.bfloat16)[k:].view(1, 1, 32) for k in (0, 1)]
    x = torch.randn(2, 1, 4).to(torch.bfloat16)
    with gpu(EMULATED, weak=WEAK) as machine:
        right = [module(x, (h0.clone(), torch.zeros(1, 1, 32).bfloat16()))[0] for h0 in states]
        assert len(machine.kernels) == 1
        got = [module(x, (h0, torch.zeros(1, 1, 32).bfloat16()))[0] for h0 in states]
        assert len(machine.kernels) == 2
    for a, b in zip(got, right, strict=True):
        assert torch.equal(a, b)


def test_a_spin_limit_that_runs_out(takes, monkeypatch):
    monkeypatch.setenv("TRITON_LSTM_SPIN_LIMIT", "1")
    module, x = triton_lstm.LSTM(4, 64, backend="triton"), torch.randn(4, 2, 4)
    takes(FLAG)
    with gpu(EMULATED, weak=True), pytest.raises(RuntimeError, match="SPIN_LIMIT=1 times and gave up"):
        module(x)
    module = triton_lstm.LSTM(4, 32, backend="triton")
    takes(ALONE, SPLITS["flag 4"])
    with gpu(EMULATED, weak=True), pytest.raises(RuntimeError, match="SPIN_LIMIT=1 times and gave up"):
        module(x)[0].sum().backward()


def test_a_spin_limit_that_suffices(takes, monkeypatch):
    monkeypatch.setenv("TRITON_LSTM_SPIN_LIMIT", "1000000")
    for plan in (FLAG, BARRIER):
        takes(plan)
        like_nn_lstm(64, T=2)
    takes(ALONE, SPLITS["flag 4"])
    like_nn_lstm(32, T=3)


@pytest.mark.parametrize("exchange", ["flag", "barrier"])
def test_the_bare_exchange_of_the_benchmarks(exchange):
    loop = ExchangeLoop(3, 4, exchange, torch.device("cpu"), one_launch=True)
    loop.run()
    assert loop.complete()


def test_nan_in_the_data_passes_through(takes):
    """Honest NaN, also with the sentinel's bits, ends no wait too early and makes none endless."""
    from triton_lstm.kernels.exchange import SENTINEL

    takes(FLAG)
    torch.manual_seed(0)
    module, x = triton_lstm.LSTM(4, 32, backend="triton", dtype=torch.bfloat16), torch.randn(3, 3, 4).bfloat16()
    h0, c0 = torch.zeros(2, 1, 3, 32).bfloat16()
    h0.view(torch.int16)[0, 1, 5] = SENTINEL
    x[1, 2, 0] = torch.nan
    y = module(x, (h0, c0))[0]
    assert y[:, 0].isfinite().all() and y[:, 1].isnan().all() and y[1:, 2].isnan().all() and y[0, 2].isfinite().all()


def test_without_the_fill_a_row_is_read_that_nobody_wrote(takes, monkeypatch):
    monkeypatch.setattr("triton_lstm.kernels.launch.make_ready", lambda kind, buffer, signals, parts: signals.zero_())
    takes(FLAG)
    found = r"(?s)reads what nobody wrote, element .* of y_ptr: product\.py:.*Fewer decisions that fail, too: seed \d+"
    with pytest.raises(Fault, match=found):
        triton_lstm.LSTM(4, 32, backend="triton")(torch.randn(2, 2, 4))
