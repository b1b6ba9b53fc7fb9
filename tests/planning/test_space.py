"""Which configs there are, and plans in words."""

import dataclasses

import pytest
from gpus import small_gpu

from triton_lstm.planning.cost import cost
from triton_lstm.planning.devices import GPUS, INTERPRETER, KIB, MIB, file_name, known_gpu
from triton_lstm.planning.limits import directions_at_once
from triton_lstm.planning.plan import Plan, Tile
from triton_lstm.planning.problem import Problem
from triton_lstm.planning.space import candidates, make_plan, space, streamed, with_groups

H200 = GPUS["H200"]


def values(plans, field):
    return {getattr(plan, field) for plan in plans}


def test_every_config_of_a_small_layer():
    """16 units, 16 rows: one chunk of 64, which 8 warps cannot share."""
    plans = list(space(Problem(H200, "bf16", 16, 9, False)))
    expected = {Plan("none", True, True, 16, 16, 16, 1, 1, warps) for warps in (4, 8)} | {
        Plan(exchange, True, resident, 16, block_h, 64, slices, 1, warps)
        for exchange in ("flag", "barrier")
        for resident in (True, False)
        for block_h in (8, 16)
        for slices, warps in ((1, 4), (4, 4), (1, 8))
    }
    assert len(plans) == len(expected) and set(plans) == expected


@pytest.mark.parametrize("precision, chunks", [("bf16", {64, 128, 256, 512}), ("tf32", {32, 64, 128, 256})])
def test_configs_of_a_large_layer(precision, chunks):
    plans = list(space(Problem(H200, precision, 64, 1024, False)))
    several = [plan for plan in plans if plan.exchange != "none"]
    assert values(several, "block_k") == chunks and values(several, "block_h") == {8, 16, 32, 64, 128}
    assert values(plans, "block_b") == {16, 32, 64} and values(plans, "warps") == {4, 8}
    assert {(plan.slices, plan.warps) for plan in several} == {(1, 4), (4, 4), (1, 8), (8, 8)}
    assert min(plan.block_k / plan.slices for plan in several) == 16
    assert values(plans, "splits") == {1}
    alone = [plan for plan in plans if plan.exchange == "none"]
    assert {(plan.block_h, plan.block_k, plan.slices, plan.resident) for plan in alone} == {(1024, 1024, 1, True)}


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32", "fp64"])
@pytest.mark.parametrize("hidden_size", [9, 1000])
def test_sizes_of_blocks_are_powers_of_2(hidden_size, precision):
    for backward in (False, True):
        for plan in space(Problem(H200, precision, 100, hidden_size, backward)):
            for n in (plan.block_b, plan.block_h, plan.block_k, plan.slices, plan.splits, plan.warps):
                assert isinstance(n, int) and n > 0 and n & (n - 1) == 0, plan


@pytest.mark.parametrize(
    "batch, tiles", [(1, {16}), (16, {16}), (17, {16, 32}), (33, {16, 32, 64}), (500, {16, 32, 64})]
)
def test_tiles_are_no_larger_than_the_batch_needs(batch, tiles):
    assert values(space(Problem(H200, "bf16", batch, 64, False)), "block_b") == tiles


def test_sums_are_split_backward_where_weights_stay():
    plans = list(space(Problem(H200, "bf16", 16, 128, True)))
    split = [plan for plan in plans if plan.splits > 1]
    assert values(split, "splits") == {2, 4, 8} and values(split, "resident") == {True}
    assert values(split, "exchange") == {"flag", "barrier"}
    assert {plan.block_h // plan.splits for plan in split} == {8, 16, 32, 64}  # own units
    assert max(plan.block_k * plan.splits for plan in split) == 512  # of 4 * 128 gradients
    for plan in split:
        assert dataclasses.replace(plan, splits=1) in plans
    assert len(set(plans)) == len(plans)


def test_plans_of_the_interpreter():
    """As few programs as tiles of 2**20 elements allow."""
    for batch, hidden_size, expected in (
        (1, 1, Plan("none", True, True, 1, 1, 1, 1, 1, 1)),
        (17, 130, Plan("none", True, True, 32, 256, 256, 1, 1, 1)),
        (64, 512, Plan("none", True, True, 64, 512, 512, 1, 1, 1)),
        (1000, 512, Plan("none", True, True, 64, 512, 512, 1, 1, 1)),
        (3, 513, Plan("flag", False, True, 4, 256, 1024, 1, 1, 1)),
    ):
        assert make_plan(Problem(INTERPRETER, "fp32", batch, hidden_size, False)) == expected


def test_groups():
    """Without a launch for all steps as many as there are tiles; else as fit, and no more than rounds need."""
    plan = Plan("flag", False, True, 16, 16, 64, 1, 1, 8)  # 32 programs a group
    for batch, processors, one_launch, directions, groups in (
        (500, 2, False, 1, 32),
        (1, 2, False, 1, 1),
        (500, 132, True, 1, 4),  # 8 rounds
        (65, 132, True, 1, 3),  # 2 rounds of 5 tiles
        (65, 132, True, 2, 2),  # which leave room for the other direction
        (33, 31, True, 2, 1),
    ):
        problem = Problem(small_gpu(processors, 65536), "bf16", batch, 512, False, directions)
        got = with_groups(problem, dataclasses.replace(plan, one_launch=one_launch)).groups
        assert got == groups and type(got) is int, (batch, processors, one_launch, directions)


def test_where_nothing_fits_at_once_and_where_nothing_runs():
    """The fallbacks, one after the other: a launch per step, then what loads in small pieces, then an error."""
    problem = Problem(small_gpu(6, 65536), "bf16", 16, 512, False)
    assert values(candidates(problem), "one_launch") == {False}
    fits = min(candidates(problem._replace(device=small_gpu(1, 20000))), key=lambda plan: plan.block_k)
    assert not fits.one_launch
    with pytest.raises(ValueError, match="a program has 5000 bytes of shared memory on small, too few"):
        candidates(problem._replace(device=small_gpu(1, 5000)))


def test_two_directions_may_take_the_device_in_turn():
    """Plans for both at a time, and for one after the other."""
    problem = Problem(H200, "bf16", 80, 1024, True, directions=2)
    plans = candidates(problem)
    assert len({dataclasses.replace(plan, groups=1) for plan in plans}) < len(plans)
    times = [cost(problem, plan).us * (3 - directions_at_once(problem, plan)) for plan in plans]
    assert times == sorted(times) and {directions_at_once(problem, plan) for plan in plans} == {1, 2}


def test_streamed():
    plan = Plan("flag", True, True, 16, 16, 512, 4, 2, 4)
    assert streamed(plan, 2) == Plan("flag", True, False, 16, 16, 128, 1, 2, 4)
    assert type(streamed(plan, 2).block_k) is int
    assert streamed(dataclasses.replace(plan, block_k=32), 4) == Plan("flag", True, False, 16, 16, 32, 1, 2, 4)


def test_a_plan_in_words():
    plan = Plan("flag", True, True, 16, 8, 256, 4, 1, 4)
    other = Plan("barrier", False, False, 32, 64, 128, 1, 2, 8, splits=2)
    alone = Plan("none", True, True, 16, 32, 32, 1, 1, 4)
    assert str(plan) == "flag 16x8/256:4 w4"
    assert str(other) == "barrier 32x64/128:1 w8 split 2 x2 streamed step by step"
    assert plan.describe(60) == (
        "flag exchange, 8 x 1 programs of 8 units x 16 rows, 4 warps, chunks of 256 in 4, W_hh on chip"
    )
    assert other.describe(64) == (
        "barrier exchange, 2 x 2 programs of 32 units x 32 rows, sums split among 2, 8 warps, chunks of 128 in 1, "
        "W_hh read in every step, a launch per step"
    )
    assert alone.describe(32).startswith("no exchange, 1 x 1 programs of 32 units")
    assert plan.tile == Tile(True, 16, 8, 256, 4, 1, 4) and other.tile.SPLITS == 2


def test_sums_in_whole_chunks():
    plan = Plan("flag", True, True, 16, 64, 96, 1, 1, 4)
    problem = Problem(H200, "bf16", 16, 512, False)
    assert plan.sum_length(problem) == 576  # 6 x 96
    assert plan.sum_length(problem._replace(backward=True)) == 2112
    assert dataclasses.replace(plan, splits=4).sum_length(problem._replace(backward=True)) == 576
    alone = dataclasses.replace(plan, exchange="none")
    assert [alone.sum_length(problem._replace(backward=backward)) for backward in (False, True)] == [96, 4 * 96]


def test_devices():
    for name in ("H200", "h200", "NVIDIA H200", "nvidia h200"):
        assert known_gpu(name) is H200
    with pytest.raises(ValueError, match=r"there is no 'H900'\. There are A100, RTX 3090"):
        known_gpu("H900")
    assert file_name("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3.json"
    assert file_name("(Odd) GPU!") == "odd_gpu.json"
    assert (H200.backend, H200.shared_bytes, H200.registers, H200.l2_bytes) == ("cuda", 227 * KIB, 65536, 60 * MIB)
    sizes = {precision: H200.itemsize(precision) for precision in ("bf16", "fp16", "tf32", "fp32", "fp64")}
    assert sizes == dict(bf16=2, fp16=2, tf32=4, fp32=8, fp64=8)
    amd = GPUS["MI300X"]
    assert amd.itemsize("fp32") == INTERPRETER.itemsize("fp32") == 4
    with pytest.raises(ValueError, match="has no tf32"):
        amd.itemsize("tf32")
