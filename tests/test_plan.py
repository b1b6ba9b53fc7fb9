"""Plans for machines that are not here, and the kernels' signatures."""

import dataclasses
import re

import pytest

pytest.importorskip("hypothesis")
from gpus import SMALL_GPU, small_gpu
from hypothesis import given
from hypothesis import strategies as st

from triton_lstm.cost import cost
from triton_lstm.devices import GPUS, INTERPRETER
from triton_lstm.limits import co_resident, shared_bytes, why_impossible, why_not
from triton_lstm.plan import Plan, candidates, make_plan, space

H200 = GPUS["H200"]


@given(
    st.sampled_from([*GPUS.values(), SMALL_GPU, small_gpu(1, 49152)]),
    st.sampled_from([2, 4, 8]),
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.booleans(),
)
def test_every_plan_can_run(device, itemsize, batch, hidden_size, backward):
    plan = make_plan(device, itemsize, batch, hidden_size, backward)
    programs, groups = plan.grid(hidden_size)
    assert programs * plan.block_h >= hidden_size and groups >= 1
    assert groups <= -(-batch // plan.block_b)
    assert shared_bytes(itemsize, hidden_size, backward, plan) <= device.shared_bytes
    if plan.one_launch and plan.exchange != "none":
        # or the programs would wait for one that never starts
        assert programs * groups <= co_resident(device, itemsize, hidden_size, backward, plan)
    if plan.exchange == "none":
        assert programs == 1
    if device.backend == "hip":
        assert plan.exchange != "flag"  # gfx942 drops `volatile`
    assert plan.block_k % (16 * plan.slices) == 0


def test_resident_where_it_fits():
    for hidden_size in (256, 512, 768, 1024):
        for backward in (False, True):
            plan = make_plan(H200, 2, 16, hidden_size, backward)
            assert plan.exchange == "flag" and plan.resident and plan.one_launch
    assert not make_plan(H200, 2, 16, 2048, False).resident


def test_one_program_for_small_layers():
    assert make_plan(H200, 2, 16, 64, False).exchange == "none"
    assert make_plan(H200, 4, 16, 32, True).exchange == "none"
    assert make_plan(H200, 4, 16, 128, False).exchange == "flag"


def test_large_batches_use_the_whole_device():
    programs, groups = make_plan(H200, 2, 256, 1024, False).grid(1024)
    assert programs * groups > 132 / 2


def test_a_device_too_small_launches_step_by_step():
    plan = make_plan(SMALL_GPU, 2, 16, 2048, False)
    assert not plan.one_launch


def test_the_interpreter_takes_one_program():
    plan = make_plan(INTERPRETER, 4, 17, 130, False)
    assert plan.grid(130) == (1, 1) and plan.exchange == "none"
    exchanges = [make_plan(INTERPRETER, 4, 17, hidden_size, False).exchange for hidden_size in (512, 513)]
    assert exchanges == ["none", "flag"]  # 4 * 512 * 512 weights are the most that a tile may have
    wide = make_plan(INTERPRETER, 4, 1000, 2048, False)  # a tile may have 2**20 elements
    assert 4 * wide.block_h * max(wide.block_k, wide.block_b) <= 1 << 20 and not wide.one_launch


@pytest.mark.parametrize("name", ["lstm_forward_kernel", "lstm_backward_kernel"])
def test_at_most_20_run_time_arguments(name):
    import triton_lstm.kernels

    kernel = getattr(triton_lstm.kernels, name)
    annotations = kernel.fn.__annotations__
    run_time = [arg for arg in kernel.arg_names if "constexpr" not in str(annotations.get(arg, ""))]
    assert 0 < len(run_time) <= 20, run_time


SHAPES = [(2, 16, 768), (4, 64, 512), (8, 64, 768), (2, 256, 1024), (2, 16, 2048), (2, 1, 48)]


@pytest.mark.parametrize("gpu", list(GPUS))
@pytest.mark.parametrize("itemsize, batch, hidden_size", SHAPES)
@pytest.mark.parametrize("backward", [False, True])
def test_candidates_run_and_are_in_order(gpu, itemsize, batch, hidden_size, backward):
    device, problem = GPUS[gpu], (itemsize, batch, hidden_size, backward)
    plans = candidates(device, *problem)
    assert plans[0] == make_plan(device, *problem) and len(set(plans)) == len(plans)
    assert all(why_impossible(device, itemsize, hidden_size, backward, plan) is None for plan in plans)
    if device.backend == "cuda":
        assert all(why_not(device, itemsize, hidden_size, backward, plan) is None for plan in plans)
    times = [cost(device, *problem, plan).us for plan in plans]
    assert times == sorted(times) and times[0] > 0


def test_every_config_that_is_dropped_has_its_reason():
    reasons = {}
    for gpu, hidden_size in (("L4", 1024), ("MI300X", 256), ("H200", 768)):
        for plan in space(2, 16, hidden_size, False):
            reason = why_not(GPUS[gpu], 2, hidden_size, False, plan)
            reasons.setdefault(gpu, set()).add(reason and re.sub(r"[\d.]+", "N", reason))
    assert {None, "the flag exchange needs volatile loads, which the compiler for AMD drops"} <= reasons["MI300X"]
    assert "it needs N KiB of shared memory, a program has N KiB" in reasons["L4"]
    assert "its N programs wait for each other, and only N run at once" in reasons["L4"]
    assert "it would spill registers: N sums" in reasons["H200"]


def test_a_plan_for_a_smaller_layer_is_refused():
    alone = make_plan(H200, 2, 16, 64, False)
    assert "cannot hold a layer of 65" in why_not(H200, 2, 65, False, alone)


def test_two_programs_on_a_processor_only_where_both_fit():
    small = Plan("flag", True, True, 16, 8, 64, 1, 1, 4)
    assert co_resident(H200, 2, 512, False, small) == 2 * H200.processors
    assert co_resident(H200, 2, 512, False, dataclasses.replace(small, warps=8)) == H200.processors  # by registers
    assert co_resident(H200, 2, 1024, False, dataclasses.replace(small, block_h=16)) == H200.processors  # by memory
    assert co_resident(GPUS["MI300X"], 2, 512, False, small) == GPUS["MI300X"].processors  # nothing is known


def test_two_programs_fit_a_processor_to_the_byte():
    """Each of them takes what it needs and 1 KiB of the system's, of which a processor has one more than a program."""
    small = Plan("flag", True, True, 16, 8, 64, 1, 1, 4)
    exactly = 2 * shared_bytes(2, 512, False, small) + 1024
    fits, short = (small_gpu(5, exactly - missing) for missing in (0, 1))
    assert co_resident(fits, 2, 512, False, small) == 10
    assert co_resident(short, 2, 512, False, small) == 5


def test_two_programs_fit_a_processor_to_the_register():
    small = Plan("flag", True, True, 16, 8, 64, 1, 1, 4)
    roomy = small_gpu(5, 1 << 20)
    fits, short = (dataclasses.replace(roomy, registers=2 * 4 * 32 * 256 - missing) for missing in (0, 1))
    assert co_resident(fits, 2, 512, False, small) == 10
    assert co_resident(short, 2, 512, False, small) == 5


def test_what_is_just_enough_is_enough():
    """Processors for programs that wait for each other, shared memory, registers; one less is too little."""
    plan = Plan("flag", True, True, 16, 16, 64, 1, 1, 8)
    shared, registers = shared_bytes(2, 512, False, plan), 256 * 8 * 32
    enough = dataclasses.replace(small_gpu(32, shared), registers=registers)  # 512 units are 32 programs
    assert why_impossible(enough, 2, 512, False, plan) is None
    for change, reason in (
        (dict(processors=31), "its 32 programs wait for each other, and only 31 run at once"),
        (dict(shared_bytes=shared - 1), "KiB of shared memory"),
        (dict(registers=registers - 1), "8 warps with 255 registers a thread are more than a processor has"),
    ):
        assert reason in why_impossible(dataclasses.replace(enough, **change), 2, 512, False, plan)
    few = dataclasses.replace(enough, processors=31)
    assert why_impossible(few, 2, 512, False, dataclasses.replace(plan, one_launch=False)) is None  # nobody waits


def test_both_directions_fit_to_the_processor():
    plan = Plan("flag", True, True, 16, 16, 64, 1, 1, 8)
    shared = shared_bytes(2, 512, False, plan)
    for processors, fit in ((64, True), (63, False)):
        device = small_gpu(processors, shared)
        assert plan.beside(device, 2, 512, False) == fit
        assert plan.on(device, 2, 64, 512, False).groups == (2 if fit else 1)
        assert plan.on(device, 2, 64, 512, False, 2).groups == 1


def test_a_chunk_that_gives_each_thread_just_one_load():
    """16 rows of 64 in bf16 are 16 bytes for each of 128 threads."""
    plan = Plan("flag", True, True, 16, 16, 64, 1, 1, 4)
    assert why_not(H200, 2, 512, False, plan) is None
    assert "a chunk of 32 has less" in why_not(H200, 2, 512, False, dataclasses.replace(plan, block_k=32))
    assert why_not(H200, 2, 514, False, dataclasses.replace(plan, block_k=32)) is None  # rows allow 4 bytes a load


def test_groups_are_no_more_than_rounds_need():
    plan = Plan("flag", True, True, 16, 16, 64, 1, 1, 8).on(H200, 2, 5 * 16, 512, False)
    assert plan.groups == 3  # 132 // 32 = 4 at once make two rounds of five tiles, and so do 3


def test_wgmma_is_planned_where_many_rows_make_it_pay():
    plans = [make_plan(H200, 2, batch, 1024, False) for batch in (16, 256)]
    assert [plan.uses_wgmma(H200) for plan in plans] == [False, True]
    assert not plans[1].uses_wgmma(GPUS["A100"])


@pytest.mark.parametrize("hidden_size, bytes_", [(768, 16), (650, 4), (33, 2), (130, 4), (36, 8)])
def test_poll_bytes(hidden_size, bytes_):
    assert Plan("flag", True, True, 16, 16, 64, 1, 1, 4).poll_bytes(2, hidden_size, False) == bytes_


@given(
    st.sampled_from([*GPUS.values(), SMALL_GPU, small_gpu(1, 49152)]),
    st.sampled_from([2, 4, 8]),
    st.integers(1, 1000),
    st.integers(1, 3000),
    st.booleans(),
)
def test_both_directions_fit_wherever_they_are_said_to(device, itemsize, batch, hidden_size, backward):
    problem = device, itemsize, batch, hidden_size, backward
    plan = make_plan(*problem, 2)
    programs, groups = plan.grid(hidden_size)
    room = co_resident(device, itemsize, hidden_size, backward, plan)
    waits = plan.one_launch and plan.exchange != "none"
    assert plan.beside(device, itemsize, hidden_size, backward) == (not waits or 2 * programs * groups <= room)
    assert not waits or programs * groups <= room  # one direction after the other
    assert plan in (plan.on(*problem, 2), plan.on(*problem))  # no group more or less


def test_an_odd_number_of_groups_runs_one_direction_after_the_other():
    plan = make_plan(GPUS["L4"], 2, 256, 1024, True, 2)
    assert plan.groups == 3  # 6 rounds twice; one group for each direction would take 16
    assert not plan.beside(GPUS["L4"], 2, 1024, True)


def test_groups_leave_room_for_the_other_direction():
    plan = Plan("flag", True, True, 16, 16, 64, 1, 1, 8)
    one, both = (plan.on(H200, 2, 8 * 16, 512, False, directions) for directions in (1, 2))
    assert (one.groups, both.groups) == (4, 2)  # 32 programs a group, 132 at once
    assert not one.beside(H200, 2, 512, False) and both.beside(H200, 2, 512, False)
    by_steps = dataclasses.replace(plan, one_launch=False).on(H200, 2, 8 * 16, 512, False, 2)
    assert by_steps.groups == 8 and by_steps.beside(H200, 2, 512, False)  # nobody waits there


def test_directions_that_do_not_fit_together_go_one_after_the_other():
    wide = Plan("flag", True, True, 16, 8, 64, 1, 1, 8).on(H200, 2, 16, 768, False, 2)
    assert wide.grid(768) == (96, 1) and not wide.beside(H200, 2, 768, False)
    assert dataclasses.replace(wide, block_h=16).beside(H200, 2, 768, False)


@pytest.mark.parametrize("gpu", list(GPUS))
@pytest.mark.parametrize("itemsize, batch, hidden_size", SHAPES)
@pytest.mark.parametrize("backward", [False, True])
def test_two_directions_never_cost_more_than_twice_one(gpu, itemsize, batch, hidden_size, backward):
    device, problem = GPUS[gpu], (itemsize, batch, hidden_size, backward)
    times = []
    for plan in candidates(device, *problem, 2):
        alone, side_by_side = (cost(device, *problem, plan, directions).us for directions in (1, 2))
        assert alone <= side_by_side <= 2 * alone
        times.append(side_by_side if plan.beside(device, itemsize, hidden_size, backward) else 2 * alone)
    assert times == sorted(times) and times[0] <= 2 * cost(device, *problem, make_plan(device, *problem)).us


class TestCost:
    PLAN = Plan("flag", True, True, 16, 16, 256, 1, 2, 4)

    def of(self, **changes):
        return cost(H200, 2, 32, 768, changes.pop("backward", False), dataclasses.replace(self.PLAN, **changes))

    def test_the_parts_add_up(self):
        c = self.of()
        assert (
            c.us == pytest.approx(c.exchange + c.rows + c.weights + c.product + c.cell) and c.weights == c.launch == 0
        )
        assert f"{c.us:.2f} us a step (exchange 0.70 + rows" in str(c)

    def test_what_costs_more(self):
        base = self.of().us
        for changes in (
            dict(exchange="barrier"),
            dict(resident=False),
            dict(one_launch=False),
            dict(groups=1),  # two rounds
            dict(backward=True),  # four times the rows
        ):
            assert self.of(**changes).us > base, changes
        assert self.of(slices=4, block_h=8).us < self.of(block_h=8).us  # one chain a warp, or all warps in the same one

    def test_programs_that_share_a_processor_wait_together(self):
        c = self.of(groups=4)
        busy = c.us - c.exchange
        assert c.sharing == 2 and c.us < 2 * (c.exchange + busy)

    def test_weights_beyond_the_cache_come_from_memory(self):
        plan = dataclasses.replace(self.PLAN, resident=False)
        near, far = (cost(GPUS[g], 2, 32, 2048, False, plan).weights for g in ("H200", "RTX 3090"))
        assert far == pytest.approx(3 * near)


def test_the_known_gpus_are_plausible():
    for name, device in GPUS.items():
        assert name.replace("RTX ", "") in device.name and device.warp_size in (32, 64)
        assert device.arch.startswith(("sm_", "gfx")) and device.l2_bytes > 1 << 20
