"""BPTT over two axes: programs that add up each other's parts of a sum, in many random orders."""

import dataclasses

import pytest
import torch

from triton_lstm.planning.plan import Plan

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled here; `make gpu-stress` tries their exchange", allow_module_level=True)
pytest.importorskip("greenlet", reason="the concurrent interpreter needs greenlet")

import test_exchange
from test_exchange import mismatch
from test_exchange_packed import ALONE, SEGMENTS, Problem, beside, take

from triton_lstm.kernels import launch, parts

pytestmark = pytest.mark.usefixtures("interpreter")
SPLIT = Plan("flag", True, True, 4, 16, 16, 1, 2, 4, splits=2)  # LSTM(3, 20): 2 blocks of 2 programs, one without units
KINDS = ["flag", "barrier"]
__all__ = ["beside"]


@pytest.mark.parametrize("layout, both", [("dense", False), ("dense", True), ("packed", True), *SEGMENTS])
@pytest.mark.parametrize("kind", KINDS)
def test_any_order_gives_the_answer_to_the_last_bit(kind, layout, both, beside, monkeypatch):
    problem = Problem(layout, both)
    expected = problem.run(problem.twin)
    answers = {}
    for seed in range(4):
        slices, splits = 1 + (seed == 2), 4 if seed == 3 else 2
        fields = dict(splits=splits, block_h=8 * splits, slices=slices, resident=seed != 1, groups=1 + seed % 2)
        split = dataclasses.replace(SPLIT, exchange=kind, **fields)
        take(monkeypatch, ALONE, split)
        got = problem.run(problem.module, backward_seed=seed)
        assert mismatch(got, expected) < 1e-5, f"seed {seed}"
        assert problem.grids.pop() == (4, split.groups, 2 if both else 1) and not problem.grids
        same = answers.setdefault((slices, splits), got)
        assert all(torch.equal(a, b) for a, b in zip(got, same, strict=True)), f"seed {seed}"


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_told_that_parts_are_there_the_answer_is_wrong(kind, layout, beside, monkeypatch):
    """The proof that the test above can fail: words of the first two steps before anybody has stored them."""
    problem = Problem(layout, True)
    expected = problem.run(problem.twin)
    take(monkeypatch, ALONE, dataclasses.replace(SPLIT, exchange=kind))
    shipped = launch.make_ready

    def stale(exchange, buffer, signals, words):
        shipped(exchange, buffer, signals, words)
        if words is not None:
            words[:, :, 0], words[:, :, 1] = 1 << 32, 2 << 32

    monkeypatch.setattr(launch, "make_ready", stale)
    wrong = (mismatch(problem.run(problem.module, backward_seed=seed), expected) > 1e-3 for seed in range(4))
    assert any(wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_nonfinite_values_hang_nobody_and_stay_in_their_row(kind, value, beside, monkeypatch):
    problem = Problem("dense", False)
    problem.cotangents[0][1, 1, 5] = value
    take(monkeypatch, ALONE, dataclasses.replace(SPLIT, exchange=kind))
    got, expected = problem.run(problem.module, backward_seed=1), problem.run(problem.twin)
    dx, wanted = got[3], expected[3]
    assert not dx[:2, 1].isfinite().any()
    others = [0, 2, 3, 4, 5]
    torch.testing.assert_close(dx[:, others], wanted[:, others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_are_float32_in_16_bits_too(dtype, monkeypatch):
    module, twin, x, cotangents = test_exchange.problem(3, 32, dtype=dtype)
    alone = Plan("none", True, True, 16, 32, 32, 1, 1, 4)
    expected = test_exchange.run(twin, x, cotangents)
    errors = []
    for plan in (alone, dataclasses.replace(SPLIT, block_b=16, block_h=32, splits=4)):
        take(monkeypatch, alone, plan)
        errors.append(mismatch(test_exchange.run(module, x, cotangents, backward_seed=0), expected))
    assert errors[1] <= 2 * errors[0]


def test_a_bounded_wait_for_parts_gives_up_and_says_so(monkeypatch):
    """One after the other, programs never see the parts of those behind them; rows there are none before step 1."""
    module, _, x, _ = test_exchange.problem(3, 16, T=1)
    y = module(x)[0]
    take(monkeypatch, ALONE, dataclasses.replace(SPLIT, block_b=16))
    monkeypatch.setenv("TRITON_LSTM_SPIN_LIMIT", "3")
    with pytest.raises(RuntimeError, match="TRITON_LSTM_SPIN_LIMIT=3 times"):
        y.sum().backward()


def test_words_of_a_step_have_its_number(monkeypatch):
    """Those of the last two steps are there when all is done."""
    module, twin, x, cotangents = test_exchange.problem(3, 16, T=5)
    take(monkeypatch, ALONE, dataclasses.replace(SPLIT, groups=1))
    seen, shipped = [], launch.make_ready

    def keep(exchange, buffer, signals, words):
        shipped(exchange, buffer, signals, words)
        seen.extend([] if words is None else [words])

    monkeypatch.setattr(launch, "make_ready", keep)
    got = test_exchange.run(module, x, cotangents, backward_seed=0)
    assert mismatch(got, test_exchange.run(twin, x, cotangents)) < 1e-5
    assert [set((words >> 32).unique().tolist()) for words in seen] == [{4, 5}]


def test_words_of_a_launch():
    device = torch.device("cpu")
    words = parts.parts_for(dataclasses.replace(SPLIT, block_b=16, block_h=64, splits=4), 2, 40, 256, device)
    assert words.numel() * 8 == 2 * 16 * 4 * 48 * 256  # 16 bytes for each split, row and unit of a direction
    assert parts.parts_for(SPLIT.on_one_axis, 2, 40, 256, device) is None
