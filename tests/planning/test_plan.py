"""Plans for machines that are not here, and the kernels' signatures."""

import dataclasses

import pytest

pytest.importorskip("hypothesis")
from gpus import SMALL_GPU, problem_of, small_gpu
from hypothesis import given
from hypothesis import strategies as st

from triton_lstm.planning.devices import GPUS, INTERPRETER
from triton_lstm.planning.limits import co_resident, directions_at_once, shared_bytes
from triton_lstm.planning.plan import EXCHANGES, Plan
from triton_lstm.planning.problem import Problem
from triton_lstm.planning.space import make_plan, with_groups

H200 = GPUS["H200"]


@given(
    st.sampled_from([*GPUS.values(), SMALL_GPU, small_gpu(1, 49152)]),
    st.sampled_from([2, 4, 8]),
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.booleans(),
)
def test_every_plan_can_run(device, itemsize, batch, hidden_size, backward):
    problem = problem_of(device, itemsize, batch, hidden_size, backward)
    plan = make_plan(problem)
    programs, groups = plan.grid(hidden_size)
    assert programs * (plan.block_h // plan.splits) >= hidden_size and groups >= 1
    assert groups <= -(-batch // plan.block_b)
    assert shared_bytes(problem, plan) <= device.shared_bytes
    if plan.one_launch and plan.exchange != "none":
        # or the programs would wait for one that never starts
        assert programs * groups <= co_resident(problem, plan)
    if plan.exchange == "none":
        assert programs == 1
    if device.backend == "hip":
        assert plan.exchange != "flag"  # gfx942 drops `volatile`
    assert plan.block_k % (16 * plan.slices) == 0


def test_resident_where_it_fits():
    for hidden_size in (256, 512, 768, 1024):
        for backward in (False, True):
            plan = make_plan(Problem(H200, "bf16", 16, hidden_size, backward))
            assert plan.exchange in EXCHANGES and plan.resident and plan.one_launch
    assert not make_plan(Problem(H200, "bf16", 16, 2048, False)).resident


def test_one_program_for_small_layers():
    assert make_plan(Problem(H200, "bf16", 16, 32, False)).exchange == "none"
    # Backward nothing hides what a program that is alone loads in every step
    assert make_plan(Problem(H200, "bf16", 16, 32, True)).exchange in EXCHANGES
    assert make_plan(Problem(H200, "tf32", 16, 128, False)).exchange in EXCHANGES


def test_large_batches_use_the_whole_device():
    programs, groups = make_plan(Problem(H200, "bf16", 256, 1024, False)).grid(1024)
    assert programs * groups > 132 / 2


def test_a_device_too_small_launches_step_by_step():
    plan = make_plan(Problem(SMALL_GPU, "bf16", 16, 2048, False))
    assert not plan.one_launch


def test_the_interpreter_takes_one_program():
    plan = make_plan(Problem(INTERPRETER, "fp32", 17, 130, False))
    assert plan.grid(130) == (1, 1) and plan.exchange == "none"
    exchanges = [make_plan(Problem(INTERPRETER, "fp32", 17, H, False)).exchange for H in (512, 513)]
    assert exchanges == ["none", "flag"]  # 4 * 512 * 512 weights are the most that a tile may have
    wide = make_plan(Problem(INTERPRETER, "fp32", 1000, 2048, False))  # a tile may have 2**20 elements
    assert 4 * wide.block_h * max(wide.block_k, wide.block_b) <= 1 << 20 and not wide.one_launch


@pytest.mark.parametrize("name", ["lstm_forward_kernel", "lstm_backward_kernel"])
def test_at_most_20_run_time_arguments(name):
    import triton_lstm.kernels

    kernel = getattr(triton_lstm.kernels, name)
    annotations = kernel.fn.__annotations__
    run_time = [arg for arg in kernel.arg_names if "constexpr" not in str(annotations.get(arg, ""))]
    assert 0 < len(run_time) <= 20, run_time


def test_groups_are_no_more_than_rounds_need():
    plan = with_groups(Problem(H200, "bf16", 5 * 16, 512, False), Plan("flag", True, True, 16, 16, 64, 1, 1, 8))
    assert plan.groups == 3  # 132 // 32 = 4 at once make two rounds of five tiles, and so do 3


def test_wgmma_is_planned_where_many_rows_make_it_pay():
    plans = [make_plan(Problem(H200, "bf16", batch, 2048, False)) for batch in (16, 256)]
    assert [plan.uses_wgmma(H200) for plan in plans] == [False, True]
    assert not plans[1].uses_wgmma(GPUS["A100"])


@pytest.mark.parametrize("hidden_size, bytes_", [(768, 16), (650, 4), (33, 2), (130, 4), (36, 8)])
def test_load_bytes(hidden_size, bytes_):
    assert Problem(H200, "bf16", 16, hidden_size, False).load_bytes == bytes_


@given(
    st.sampled_from([*GPUS.values(), SMALL_GPU, small_gpu(1, 49152)]),
    st.sampled_from([2, 4, 8]),
    st.integers(1, 1000),
    st.integers(1, 3000),
    st.booleans(),
)
def test_both_directions_fit_wherever_they_are_said_to(device, itemsize, batch, hidden_size, backward):
    problem = problem_of(device, itemsize, batch, hidden_size, backward, 2)
    plan = make_plan(problem)
    programs, groups = plan.grid(hidden_size)
    room = co_resident(problem, plan)
    waits = plan.one_launch and plan.exchange != "none"
    assert (directions_at_once(problem, plan) == 2) == (not waits or 2 * programs * groups <= room)
    assert not waits or programs * groups <= room  # one direction after the other
    assert plan in (with_groups(problem, plan), with_groups(problem._replace(directions=1), plan))  # no group too many


def test_an_odd_number_of_groups_runs_one_direction_after_the_other():
    problem = Problem(GPUS["L4"], "bf16", 80, 1024, True, directions=2)
    plan = make_plan(problem)
    assert plan.groups == 3  # 2 rounds twice; one group for each direction would take 5
    assert directions_at_once(problem, plan) == 1


def test_groups_leave_room_for_the_other_direction():
    plan = Plan("flag", True, True, 16, 16, 64, 1, 1, 8)
    problem = Problem(H200, "bf16", 8 * 16, 512, False, directions=2)
    one, both = (with_groups(problem._replace(directions=directions), plan) for directions in (1, 2))
    assert (one.groups, both.groups) == (4, 2)  # 32 programs a group, 132 at once
    assert [directions_at_once(problem, sized) for sized in (one, both)] == [1, 2]
    by_steps = with_groups(problem, dataclasses.replace(plan, one_launch=False))
    assert by_steps.groups == 8 and directions_at_once(problem, by_steps) == 2  # nobody waits there


def test_directions_that_do_not_fit_together_go_one_after_the_other():
    problem = Problem(H200, "bf16", 16, 768, False, directions=2)
    wide = with_groups(problem, Plan("flag", True, True, 16, 8, 64, 1, 1, 8))
    assert wide.grid(768) == (96, 1) and directions_at_once(problem, wide) == 1
    assert directions_at_once(problem, dataclasses.replace(wide, block_h=16)) == 2


def test_a_problem_is_hashed_and_compared_without_running_python():
    """Plans are looked up by it on every call."""
    problem, same = (Problem(H200._replace(name="H200"), "bf16", 16, 768, False) for _ in range(2))
    assert problem == same and hash(problem) == hash(same) and problem != same._replace(directions=2)
    for kind in (type(problem), type(H200)):
        assert kind.__hash__ is tuple.__hash__ and kind.__eq__ is tuple.__eq__


def test_the_known_gpus_are_plausible():
    for name, device in GPUS.items():
        assert name.replace("RTX ", "") in device.name and device.warp_size in (32, 64)
        assert device.arch.startswith(("sm_", "gfx")) and device.l2_bytes > 1 << 20
