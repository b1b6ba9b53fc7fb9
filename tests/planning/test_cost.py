"""The cost model, and the order that it gives the candidates."""

import dataclasses

import pytest
from gpus import problem_of

from triton_lstm.planning.cost import LAUNCH_US, Constants, Cost, beyond_l2, cost
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


NOTHING = Constants(**dict.fromkeys((field.name for field in dataclasses.fields(Constants)), 0.0))
TERMS = [  # constant, part of the cost, what is unlike TestCost, expected for a constant of 1
    ("step", "exchange", {}, 1),
    ("step", "exchange", dict(exchange="none", block_h=1024, block_k=1024), 0),
    ("step", "exchange", dict(splits=2, backward=True), 1),
    ("alone", "exchange", {}, 0),
    ("alone", "exchange", dict(exchange="none", block_h=1024, block_k=1024), 1),
    ("alone_backward", "exchange", dict(exchange="none", block_h=1024, block_k=1024), 0),
    ("alone_backward", "exchange", dict(exchange="none", block_h=1024, block_k=1024, backward=True), 1),
    ("warp", "exchange", {}, 0),
    ("warp", "exchange", dict(warps=8), 4),
    ("poll", "exchange", {}, 48),  # 768 / 16 programs
    ("poll", "exchange", dict(warps=8), 96),
    ("release", "exchange", {}, 0),
    ("release", "exchange", dict(exchange="barrier"), 1),
    ("look", "exchange", {}, 6),  # 16 rows x 768 x 2 bytes in 4 warps
    ("look", "exchange", dict(exchange="barrier"), 0),
    ("look", "exchange", dict(H=800), 8),  # in whole chunks of 256
    ("look", "exchange", dict(precision="fp32"), 12),  # two numbers on chip, one in memory
    ("port", "rows", {}, 24),
    ("port", "rows", dict(exchange="none", block_h=1024, block_k=1024), 0),
    ("l2", "rows", {}, 2.25),  # 24 KiB in 96 programs
    ("l2", "rows", dict(groups=4), 2.25),  # 192 programs, of which 96 read at a time
    ("l2", "rows", dict(H=784, groups=3), 73 / 32),  # 32 KiB in 73 of 147 programs
    ("l2", "rows", dict(directions=2), 2.25),
    ("parts", "exchange", {}, 0),
    ("parts", "exchange", dict(splits=2, backward=True), 1),
    ("port", "parts", {}, 0),
    ("port", "parts", dict(splits=2, backward=True), 4),  # 16 x 16 words of 8 bytes, written and read
    ("l2", "parts", dict(splits=2, backward=True), 0.375),  # in 96 of 192 programs
    ("port", "weights", {}, 0),
    ("port", "weights", dict(resident=False), 96),  # 4 x 16 rows of 768 x 2 bytes
    ("l2", "weights", dict(resident=False), 9),
    ("port", "weights", dict(resident=False, H=2816, block_k=256), 352 * 3),  # 60.5 MiB of weights: beyond L2
    ("chunk", "product", {}, 1),  # three chunks, which are all in flight
    ("chunk", "product", dict(block_b=64), 3),
    ("chunk", "product", dict(slices=4), 0),
    ("streamed_chunk", "product", dict(resident=False), 3),
    ("stream", "product", dict(resident=False), 96),
    ("stream", "product", dict(resident=False, slices=2), 0),
    ("stream", "product", dict(resident=False, slices=4), 0),
    ("stream_sliced", "product", dict(resident=False, slices=4), 96),
    ("stream_sliced", "product", dict(resident=False, slices=4, block_k=64), 96),
    ("stream_sliced", "product", dict(resident=False, slices=4, backward=True), 0),
    ("stream_sliced_backward", "product", dict(resident=False, slices=4, backward=True), 96),
    ("stream_sliced_backward", "product", dict(resident=False, slices=4, backward=True, block_h=8), 48),
    ("stream_sliced_backward", "product", dict(resident=False, slices=4), 0),
    ("mma", "product", {}, 48),  # 768 x 2 / 32 bytes
    ("mma", "product", dict(precision="fp32"), 288),  # of 4 bytes, in three products
    ("mma", "product", dict(slices=4), 0),
    ("mma_tile", "product", {}, 96),  # 8 tiles of 16 x 8 for 4 warps
    ("mma_tile", "product", dict(warps=8), 96),  # 1 for each, whose schedulers have two warps
    ("mma_tile", "product", dict(block_h=8, warps=8), 96),  # 4 tiles: some warps make the same one
    ("wgmma", "product", {}, 0),
    ("wgmma", "product", dict(block_b=64), 48),
    ("wgmma_tile", "product", dict(block_b=64), 384),  # 64 columns
    ("mma", "product", dict(block_b=64), 0),
    ("sliced", "product", {}, 0),
    ("sliced", "product", dict(slices=2), 192),
    ("sliced", "product", dict(slices=4), 96),
    ("shuffled", "product", dict(slices=4), 0),  # 64 elements for each warp, 128 bytes
    ("shuffled", "product", dict(slices=4, block_k=64), 12),  # 32 bytes
    ("shuffled", "product", dict(slices=4, block_k=64, resident=False), 12),
    ("shuffled", "product", dict(slices=4, block_k=128), 0),  # 64 bytes
    ("scattered", "product", dict(slices=4), 0),
    ("scattered", "product", dict(slices=4, backward=True), 0),
    ("scattered", "product", dict(slices=4, backward=True, block_h=8), 24),  # 3072 x 8 weights
    ("scattered", "product", dict(slices=4, backward=True, block_h=8, resident=False), 24),
    ("scattered", "product", dict(slices=4, block_h=8), 0),
    ("cell", "cell", {}, 2),  # 16 x 16 in 128 threads
    ("cell", "cell", dict(backward=True), 0),
    ("cell_backward", "cell", dict(backward=True), 2),
    ("cell_backward", "cell", dict(backward=True, splits=2), 1),
    ("cell_backward", "cell", {}, 0),
    ("exact", "cell", {}, 0),
    ("exact", "cell", dict(precision="tf32"), 2),
    ("exclusive", "exclusive", {}, 1),
]


@pytest.mark.parametrize("constant, part, changes, expected", TERMS, ids=str)
def test_every_constant_counts_what_it_says(constant, part, changes, expected):
    """By hand, from what is said of it in Constants."""
    ours = {name: changes[name] for name in changes if name in Problem._fields}
    problem = Problem(H200, "bf16", 32, 768, False)._replace(**ours)
    plan = dataclasses.replace(TestCost.PLAN, **{name: changes[name] for name in changes if name not in ours})
    only = dataclasses.replace(NOTHING, **{constant: 1.0})
    assert getattr(cost(problem, plan, only), part) == pytest.approx(expected)


def test_how_tiles_share_the_device():
    problem = Problem(H200, "bf16", 33, 768, False)
    for groups, directions, sharing, rounds in ((1, 1, 1, 3), (2, 1, 1, 2), (3, 1, 2, 1), (1, 2, 1, 3), (2, 2, 2, 2)):
        plan = dataclasses.replace(TestCost.PLAN, groups=groups, one_launch=False)  # nobody waits
        c = cost(problem._replace(directions=directions), plan)
        assert (c.sharing, c.rounds) == (sharing, rounds), (groups, directions)
    assert cost(problem._replace(directions=2), TestCost.PLAN).sharing == 1  # one direction after the other
    assert cost(problem, TestCost.PLAN).launch == 0
    assert cost(problem, dataclasses.replace(TestCost.PLAN, one_launch=False)).launch == LAUNCH_US


def test_what_programs_on_a_processor_do_one_after_the_other():
    c = Cost(5.0, 1.0, 0.5, 0.25, 3.0, 1.0, 10.0, sharing=2, exclusive=0.5, rounds=3)
    assert c.us == 10 + 3 * (2 * 1.75 + 5 + 4)  # while one waits the other one works
    assert dataclasses.replace(c, sharing=4).us == 10 + 3 * (4 * 1.75 + 5 + 4)
    assert dataclasses.replace(c, sharing=8).us == 10 + 3 * (8 * 1.75 + 0.5 * 8 * 4)  # always one of them works
    assert str(c) == (
        "47.50 us a step (3 rounds of exchange 5.00 + rows 1.00 + parts 0.50 + weights 0.25 + product 3.00 + "
        "cell 1.00 + launch 10.00, 2 programs sharing a processor)"
    )
    assert "(2 rounds of exchange" in str(dataclasses.replace(c, rounds=2))
    alone = dataclasses.replace(c, rows=0.0, parts=0.0, weights=0.0, launch=0.0, sharing=1, rounds=1)
    assert str(alone) == "9.00 us a step (exchange 5.00 + product 3.00 + cell 1.00)"


def test_where_weights_are_beyond_the_cache():
    """4 H^2 elements of weights, to the byte."""
    for precision, size in (("bf16", 2), ("tf32", 4), ("fp32", 4)):
        for missing in (0, 1):
            device = H200._replace(l2_bytes=4 * 512 * 512 * size - missing)
            assert beyond_l2(Problem(device, precision, 16, 512, False)) == bool(missing)
