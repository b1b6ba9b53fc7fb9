"""The exchange where rows are packed, segments begin, and both directions of time run: the real kernels, in many
random orders."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import triton_lstm
from triton_lstm.planning.plan import Plan

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled here; `make gpu-stress` tries their exchange", allow_module_level=True)
pytest.importorskip("greenlet", reason="the concurrent interpreter needs greenlet")

from interleave import concurrent_programs, without_the_wait
from oracle import data_of
from segments_alone import alone
from test_exchange import mismatch

from triton_lstm.kernels import launch

pytestmark = [pytest.mark.usefixtures("interpreter"), pytest.mark.unmeasured]
LENGTHS = [3, 4, 4, 1, 3, 2]  # two batch tiles of four rows, of four steps and of two
ALONE = Plan("none", True, True, 8, 32, 32, 1, 1, 4)
KINDS = ["flag", "barrier"]
# And whether both directions of time run
LAYOUTS = [("dense", True), ("packed", False), ("packed", True)]
SEGMENTS = [("dense resets", False), ("dense resets", True), ("packed resets", True)]


def plan(kind: str, **fields) -> Plan:
    defaults = dict(resident=True, block_b=4, block_h=8, block_k=16, slices=1, groups=2, warps=4)
    return Plan(kind, True, **(defaults | fields))


class Problem:
    """LSTM(3, 20) and nn.LSTM's answer: output, h_n, c_n and every gradient.

    With resets all rows of the first tile begin a segment at step 1, one row of each tile at step 2.
    """

    def __init__(self, layout: str, both: bool) -> None:
        torch.manual_seed(0)
        self.module = triton_lstm.LSTM(3, 20, bidirectional=both, backend="triton")
        self.twin = nn.LSTM(3, 20, bidirectional=both)
        self.twin.load_state_dict(self.module.state_dict())
        x = torch.randn(3 if layout == "dense" else 4, 6, 3)
        resets = torch.zeros(x.shape[:-1], dtype=torch.bool)
        if layout.startswith("packed"):
            order = torch.tensor(LENGTHS).argsort(descending=True, stable=True)
            resets[1, order[:4]] = resets[2, order[[1, 4]]] = True
            x, resets = (pack_padded_sequence(t, torch.tensor(LENGTHS), enforce_sorted=False) for t in (x, resets))
            resets = resets.data
        else:
            resets[1, :4] = resets[2, [1, 5]] = True
        self.x, self.resets = x, resets if layout.endswith("resets") else None
        directions = 2 if both else 1
        self.hx = torch.randn(2, directions, 6, 20).unbind()
        rows = data_of(x).shape[:-1]
        shapes = [(*rows, 20 * directions), (directions, 6, 20), (directions, 6, 20)]
        self.cotangents = [torch.randn(shape) for shape in shapes]
        self.grids: list[tuple[int, ...]] = []

    def run(self, module, forward_seed=None, backward_seed=None):
        """A seed makes that pass concurrent."""
        packed = isinstance(self.x, PackedSequence)
        rows, *hx = (t.clone().requires_grad_() for t in (self.x.data if packed else self.x, *self.hx))
        outputs = []

        def forward():
            x = self.x._replace(data=rows) if packed else rows
            if self.resets is None:
                y, h_c = module(x, tuple(hx))
            elif module is self.twin:
                y, h_c = alone(module, x, tuple(hx), self.resets)
            else:
                y, h_c = module(x, tuple(hx), resets=self.resets)
            outputs.extend([y.data if packed else y, *h_c])

        module.zero_grad()
        for seed, work in (
            (forward_seed, forward),
            (backward_seed, lambda: torch.autograd.backward(outputs, self.cotangents)),
        ):
            if seed is None:
                work()
                continue
            with concurrent_programs(seed) as scheduler:
                work()
            self.grids += scheduler.grids
        return [t.detach() for t in (*outputs, rows.grad, *(t.grad for t in (*hx, *module.parameters())))]


@pytest.fixture
def beside(monkeypatch):
    """Both directions of time in one launch, for which the interpreter's one processor has no room."""
    monkeypatch.setattr(launch, "directions_at_once", lambda problem, plan: problem.directions)
    monkeypatch.setattr(launch, "_prepared", launch._prepared.__wrapped__)


def take(monkeypatch, forward: Plan, backward: Plan) -> None:
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: plans[backward])
    plans = {False: forward, True: backward}


@pytest.mark.parametrize("layout, both", LAYOUTS + SEGMENTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_any_order_gives_the_answer(passes, kind, layout, both, beside, monkeypatch):
    problem = Problem(layout, both)
    expected = problem.run(problem.twin)
    for seed in range(3):
        concurrent = plan(kind, groups=2 - seed % 2, resident=seed < 2, slices=1 + seed // 2)
        take(monkeypatch, *((concurrent, ALONE) if passes == "forward" else (ALONE, concurrent)))
        got = problem.run(problem.module, **{f"{passes}_seed": seed})
        assert mismatch(got, expected) < 1e-5, f"seed {seed}"
        assert problem.grids.pop() == (3, concurrent.groups, 2 if both else 1) and not problem.grids


@pytest.mark.parametrize("layout, both", LAYOUTS + SEGMENTS[1:])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_without_the_wait_the_answer_is_wrong(passes, kind, layout, both, beside, monkeypatch):
    """The proof that the test above can fail: the same run, its readers told that everything has arrived."""
    problem = Problem(layout, both)
    expected = problem.run(problem.twin)
    take(monkeypatch, *((plan(kind), ALONE) if passes == "forward" else (ALONE, plan(kind))))
    without_the_wait(monkeypatch)
    wrong = 0
    for seed in range(8):
        wrong += mismatch(problem.run(problem.module, **{f"{passes}_seed": seed}), expected) > 1e-3
        if wrong == 2:
            return
    pytest.fail(f"only {wrong} of 8 orders were wrong")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_directions_one_after_the_other_give_the_same(layout, kind, monkeypatch):
    problem = Problem(layout, True)
    take(monkeypatch, plan(kind), plan(kind))
    results = []
    monkeypatch.setattr(launch, "_prepared", launch._prepared.__wrapped__)
    for beside in (True, False):
        monkeypatch.setattr("triton_lstm.kernels.launch.directions_at_once", lambda *_, n=1 + beside: n)
        results.append(problem.run(problem.module, 1, 2))
    assert problem.grids == [(3, 2, 2)] * 2 + [(3, 2, 1)] * 4
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_direction_has_its_own_counters(kind, layout, beside, monkeypatch):
    """One arrival for every program, step and direction: shared counters would let a direction pass on the other's."""
    counters = []
    shipped = launch.signals_for

    def kept(*args):
        counters.append(shipped(*args))
        return counters[-1]

    monkeypatch.setattr(launch, "signals_for", kept)
    problem = Problem(layout, True)
    take(monkeypatch, plan(kind), plan(kind))
    problem.run(problem.module, 0, 0)
    steps = [9, 9] if layout == "dense" else [12, 6]  # of each tile, times its three programs
    assert [signals[:, 0].tolist() for signals in counters] == [[0, *np.repeat([*steps, *steps], 4)]] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_nonfinite_values_hang_nobody_and_stay_in_their_row(layout, kind, value, beside, monkeypatch):
    """In the data of the second step of one row, and in its cotangent of the direction against time."""
    problem = Problem(layout, True)
    row = 1 if layout == "dense" else 0  # the longest sequence
    step = (1, row) if layout == "dense" else (6 + row,)
    data = problem.x if layout == "dense" else problem.x.data
    data[(*step, 0)] = value
    problem.cotangents[0][(*step, 25)] = value
    take(monkeypatch, plan(kind), plan(kind))
    got, expected = problem.run(problem.module, 3, 4), problem.run(problem.twin)
    for a, b in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    others = torch.ones(data.shape[:-1], dtype=torch.bool)
    if layout == "dense":
        others[:, row] = False
    else:
        others[problem.x.batch_sizes.cumsum(0) - problem.x.batch_sizes] = False
    torch.testing.assert_close(got[3][others], expected[3][others])
    assert got[3][others].isfinite().all() and not got[3].isfinite().all()
