"""What a device can run of a plan, and to the byte, the register and the processor where that ends."""

import dataclasses
import re

from gpus import small_gpu

from triton_lstm.planning.devices import GPUS
from triton_lstm.planning.limits import co_resident, directions_at_once, shared_bytes, why_impossible, why_not
from triton_lstm.planning.plan import Plan
from triton_lstm.planning.problem import Problem
from triton_lstm.planning.space import make_plan, space, with_groups

H200 = GPUS["H200"]
PROBLEM = Problem(H200, "bf16", 64, 512, False)
SMALL = Plan("flag", True, True, 16, 8, 64, 1, 1, 4)  # two programs fit a processor


def test_every_config_that_is_dropped_has_its_reason():
    reasons = {}
    for gpu, hidden_size in (("L4", 1024), ("MI300X", 256), ("H200", 768)):
        problem = Problem(GPUS[gpu], "bf16", 16, hidden_size, False)
        for plan in space(problem):
            reason = why_not(problem, plan)
            reasons.setdefault(gpu, set()).add(reason and re.sub(r"[\d.]+", "N", reason))
    assert {None, "the flag exchange needs NVIDIA's PTX"} <= reasons["MI300X"]
    assert "it needs N KiB of shared memory, a program has N KiB" in reasons["L4"]
    assert "its N programs wait for each other, and only N run at once" in reasons["L4"]
    assert "it would spill registers: N in sums" in reasons["H200"]


def test_where_sums_cannot_be_split():
    split = Plan("barrier", True, True, 16, 32, 64, 1, 1, 4, splits=4)
    backward = PROBLEM._replace(backward=True)
    assert why_impossible(backward, split) is None
    for problem, plan, reason in (
        (PROBLEM, split, "only BPTT"),
        (backward, dataclasses.replace(split, one_launch=False), "only BPTT"),
        (backward, dataclasses.replace(split, warps=8), "copies of the words of only 128 sums"),
        (backward._replace(H=650), split, "no 4 parts of whole 16 bytes"),
        (backward._replace(precision="fp64", H=64), split, "a part of a sum is a float32"),
        (backward._replace(device=GPUS["MI300X"]), split, "the exchange of split sums needs volatile loads"),
    ):
        assert reason in why_impossible(problem, plan)
    assert why_impossible(backward, split.on_one_axis) is None


def test_a_plan_for_a_smaller_layer_is_refused():
    alone = make_plan(PROBLEM._replace(H=32))
    assert "cannot hold a layer of 33" in why_not(PROBLEM._replace(H=33), alone)


def test_two_programs_on_a_processor_only_where_both_fit():
    assert co_resident(PROBLEM, SMALL) == 2 * H200.processors
    assert co_resident(PROBLEM, dataclasses.replace(SMALL, warps=8)) == H200.processors  # by registers
    assert co_resident(PROBLEM._replace(H=1024), dataclasses.replace(SMALL, block_h=16)) == H200.processors  # by memory
    amd = GPUS["MI300X"]
    assert co_resident(PROBLEM._replace(device=amd), SMALL) == amd.processors  # nothing is known


def test_two_programs_fit_a_processor_to_the_byte():
    """Each of them takes what it needs and 1 KiB of the system's, of which a processor has one more than a program."""
    exactly = 2 * shared_bytes(PROBLEM, SMALL) + 1024
    fits, short = (small_gpu(5, exactly - missing) for missing in (0, 1))
    assert co_resident(PROBLEM._replace(device=fits), SMALL) == 10
    assert co_resident(PROBLEM._replace(device=short), SMALL) == 5


def test_two_programs_fit_a_processor_to_the_register():
    fits, short = (small_gpu(5, 1 << 20)._replace(registers=2 * 4 * 32 * 256 - missing) for missing in (0, 1))
    assert co_resident(PROBLEM._replace(device=fits), SMALL) == 10
    assert co_resident(PROBLEM._replace(device=short), SMALL) == 5


def test_what_is_just_enough_is_enough():
    """Processors for programs that wait for each other, shared memory, registers; one less is too little."""
    plan = Plan("flag", True, True, 16, 16, 64, 1, 1, 8)
    shared, registers = shared_bytes(PROBLEM, plan), 256 * 8 * 32
    enough = small_gpu(32, shared)._replace(registers=registers)  # 512 units are 32 programs
    assert why_impossible(PROBLEM._replace(device=enough), plan) is None
    for change, reason in (
        (dict(processors=31), "its 32 programs wait for each other, and only 31 run at once"),
        (dict(shared_bytes=shared - 1), "KiB of shared memory"),
        (dict(registers=registers - 1), "8 warps with 255 registers a thread are more than a processor has"),
    ):
        assert reason in why_impossible(PROBLEM._replace(device=enough._replace(**change)), plan)
    few = PROBLEM._replace(device=enough._replace(processors=31))
    assert why_impossible(few, dataclasses.replace(plan, one_launch=False)) is None  # nobody waits


def test_both_directions_fit_to_the_processor():
    plan = Plan("flag", True, True, 16, 16, 64, 1, 1, 8)
    shared = shared_bytes(PROBLEM, plan)
    for processors, fit in ((64, True), (63, False)):
        one, two = (PROBLEM._replace(device=small_gpu(processors, shared), directions=n) for n in (1, 2))
        assert directions_at_once(two, plan) == (2 if fit else 1)
        assert with_groups(one, plan).groups == (2 if fit else 1)
        assert with_groups(two, plan).groups == 1


def test_a_chunk_that_gives_each_thread_just_one_load():
    """16 rows of 64 in bf16 are 16 bytes for each of 128 threads."""
    plan = Plan("flag", True, True, 16, 16, 64, 1, 1, 4)
    assert why_not(PROBLEM, plan) is None
    assert "a chunk of 32 has less" in why_not(PROBLEM, dataclasses.replace(plan, block_k=32))
    assert why_not(PROBLEM._replace(H=514), dataclasses.replace(plan, block_k=32)) is None  # 4 bytes a load there


def test_a_thread_has_a_register_of_rows_to_look_at():
    """16 rows of 16 in bf16 are 4 bytes for each of 128 threads, and 2 for each of 256."""
    plan = Plan("flag", True, True, 16, 16, 16, 1, 1, 4)
    assert why_impossible(PROBLEM, plan) is None
    assert "less than a register of rows" in why_impossible(PROBLEM, dataclasses.replace(plan, warps=8))
    assert why_impossible(PROBLEM, dataclasses.replace(plan, warps=8, exchange="barrier")) is None
