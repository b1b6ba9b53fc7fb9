"""The cost model, and the order that it gives the candidates."""

import dataclasses

import pytest
from gpus import problem_of

from triton_lstm.planning.cost import cost
from triton_lstm.planning.devices import GPUS
from triton_lstm.planning.limits import directions_at_once, why_impossible, why_not
from triton_lstm.planning.plan import Plan
from triton_lstm.planning.problem import Problem
from triton_lstm.planning.space import candidates, make_plan

H200 = GPUS["H200"]
SHAPES = [(2, 16, 768), (4, 64, 512), (8, 64, 768), (2, 256, 1024), (2, 16, 2048), (2, 1, 48)]


@pytest.mark.parametrize("gpu", list(GPUS))
@pytest.mark.parametrize("itemsize, batch, hidden_size", SHAPES)
@pytest.mark.parametrize("backward", [False, True])
def test_candidates_run_and_are_in_order(gpu, itemsize, batch, hidden_size, backward):
    problem = problem_of(GPUS[gpu], itemsize, batch, hidden_size, backward)
    plans = candidates(problem)
    assert plans[0] == make_plan(problem) and len(set(plans)) == len(plans)
    assert all(why_impossible(problem, plan) is None for plan in plans)
    if GPUS[gpu].backend == "cuda":
        assert all(why_not(problem, plan) is None for plan in plans)
    times = [cost(problem, plan).us for plan in plans]
    assert times == sorted(times) and times[0] > 0


@pytest.mark.parametrize("gpu", list(GPUS))
@pytest.mark.parametrize("itemsize, batch, hidden_size", SHAPES)
@pytest.mark.parametrize("backward", [False, True])
def test_two_directions_never_cost_more_than_twice_one(gpu, itemsize, batch, hidden_size, backward):
    one, two = (problem_of(GPUS[gpu], itemsize, batch, hidden_size, backward, directions) for directions in (1, 2))
    times = []
    for plan in candidates(two):
        alone, with_the_other = cost(one, plan).us, cost(two, plan).us
        if directions_at_once(two, plan) == 2:
            assert alone <= with_the_other <= 2 * alone
            times.append(with_the_other)
        else:
            assert with_the_other == alone
            times.append(2 * alone)
    assert times == sorted(times) and times[0] <= 2 * cost(one, make_plan(one)).us


class TestCost:
    PLAN = Plan("flag", True, True, 16, 16, 256, 1, 2, 4)

    def of(self, **changes):
        problem = Problem(H200, "bf16", 32, 768, changes.pop("backward", False))
        return cost(problem, dataclasses.replace(self.PLAN, **changes))

    def test_the_parts_add_up(self):
        c = self.of()
        assert (
            c.us == pytest.approx(c.exchange + c.rows + c.weights + c.product + c.cell) and c.weights == c.launch == 0
        )
        assert f"{c.us:.2f} us a step (exchange {c.exchange:.2f} + rows" in str(c)

    def test_what_costs_more(self):
        base = self.of().us
        for changes in (
            dict(resident=False),
            dict(one_launch=False),
            dict(groups=1),  # two rounds
            dict(backward=True),  # four times the rows
        ):
            assert self.of(**changes).us > base, changes
        few, many = dict(block_b=16), dict(block_b=64)  # rows to look at, which takes longer than to release them
        assert self.of(exchange="flag", **few).us < self.of(exchange="barrier", **few).us
        assert self.of(exchange="flag", **many).us > self.of(exchange="barrier", **many).us

    def test_programs_that_share_a_processor_wait_together(self):
        alone, shared = self.of(groups=2), self.of(groups=4)
        assert (alone.sharing, shared.sharing, alone.rounds, shared.rounds) == (1, 2, 1, 1)
        busy = shared.product + shared.cell
        both = max(shared.exchange + busy, 2 * shared.exclusive * busy)
        assert shared.us == pytest.approx(2 * (shared.rows + shared.weights) + both)
        assert alone.us < shared.us < 2 * alone.us

    def test_weights_beyond_the_cache_come_from_memory(self):
        plan = dataclasses.replace(self.PLAN, resident=False)
        devices = (H200, H200._replace(l2_bytes=1 << 20))
        near, far = (cost(Problem(device, "bf16", 32, 2048, False), plan).weights for device in devices)
        assert far == pytest.approx(3 * near)
