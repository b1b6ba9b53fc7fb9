"""What a device can run of a plan, and to the byte, the register and the processor where that ends."""

import dataclasses
import re

from gpus import small_gpu

from triton_lstm.planning import limits
from triton_lstm.planning.devices import GPUS
from triton_lstm.planning.limits import (
    Held,
    _spills,
    chunks_in_flight,
    co_resident,
    directions_at_once,
    held,
    shared_bytes,
    why_impossible,
    why_not,
)
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
    assert why_impossible(backward._replace(H=648), split) is None


def test_where_sums_cannot_be_split_in_two():
    split = Plan("barrier", True, True, 16, 32, 64, 1, 1, 4, splits=2)
    backward = PROBLEM._replace(backward=True)
    assert why_impossible(backward, split) is None
    for problem, plan, reason in (
        (PROBLEM, split, "only BPTT"),
        (backward._replace(H=32), dataclasses.replace(split, exchange="none", block_k=32), "only BPTT"),
        (backward, dataclasses.replace(split, block_h=8), "copies of the words of only 64 sums"),
        (backward._replace(H=649), split, "no 2 parts of whole 16 bytes"),
        (backward._replace(precision="fp64", H=64), split, "a part of a sum is a float32"),
        (backward._replace(device=GPUS["MI300X"]), split, "the exchange of split sums needs volatile loads"),
    ):
        assert reason in why_impossible(problem, plan)
    whole = dataclasses.replace(split, splits=1, block_h=8, warps=8)  # whose sums nobody splits
    assert why_impossible(backward, whole) is None
    assert why_impossible(backward._replace(precision="fp64", H=64), whole) is None


def test_a_program_that_is_alone_has_one_chunk():
    alone, small = Plan("none", True, True, 16, 32, 32, 1, 1, 4), PROBLEM._replace(H=32)
    assert why_impossible(small, alone) is None
    for change in (dict(resident=False), dict(slices=2), dict(block_k=16)):
        assert "in one chunk" in why_impossible(small, dataclasses.replace(alone, **change))


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


def test_programs_that_are_alone_run_both_directions_at_once():
    alone = Plan("none", True, True, 16, 32, 32, 1, 4, 4)
    one_processor = small_gpu(1, shared_bytes(PROBLEM._replace(H=32), alone))
    assert directions_at_once(PROBLEM._replace(H=32, device=one_processor, directions=2), alone) == 2


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


def test_shared_memory_by_hand():
    """Weights, chunks of rows, and the larger of sums and gates, in bytes."""
    plan = Plan("flag", True, True, 16, 16, 128, 1, 1, 4)
    for problem, changes, expected in (
        (PROBLEM, {}, (512 * 64 + 16 * 128 * 4) * 2 + 16 * 64 * 4),
        (PROBLEM, dict(block_k=512), (512 * 64 + 16 * 512) * 2 + 16 * 64 * 4),
        (PROBLEM, dict(resident=False), (128 * 64 + 16 * 128) * 2 + 16 * 64 * 4),
        (PROBLEM, dict(slices=4), (512 * 64 + 16 * 128) * 2 + 16 * 64 * 4 * 4),
        (PROBLEM._replace(precision="tf32"), {}, (512 * 64 + 16 * 128 * 3) * 4 + 16 * 64 * 4),
        (PROBLEM._replace(precision="fp32"), {}, (512 * 64 + 16 * 128) * 8 + 16 * 4 * 16 * 8),
        (PROBLEM._replace(backward=True), {}, (2048 * 16 + 16 * 128 * 6) * 2 + 16 * 4 * 16 * 2),
        (PROBLEM._replace(backward=True), dict(splits=2), (1024 * 16 + 16 * 128 * 6) * 2 + 16 * 4 * 16 * 2),
    ):
        assert shared_bytes(problem, dataclasses.replace(plan, **changes)) == expected, (problem, changes)
    alone = Plan("none", True, True, 16, 32, 32, 1, 1, 4)
    assert shared_bytes(PROBLEM._replace(H=32), alone) == (32 * 128 + 16 * 32) * 2 + 16 * 128 * 4
    for rows in (16, 64):
        needed = (128 * 32 + rows * 32 * 4) * 2 + rows * 128 * 2
        plan = dataclasses.replace(alone, block_b=rows)
        assert shared_bytes(PROBLEM._replace(H=32, backward=True), plan) == needed


def test_chunks_in_flight():
    """As many as fit 24 KiB and there are, where rows pass through shared memory."""
    plan = Plan("flag", True, True, 16, 16, 64, 1, 1, 4)
    for problem, changes, expected in (
        (PROBLEM, {}, 8),  # all of 512
        (PROBLEM._replace(H=2048), {}, 12),  # of 2 KiB
        (PROBLEM._replace(H=2048), dict(block_b=32), 6),
        (PROBLEM._replace(H=2048), dict(block_k=32), 24),
        (PROBLEM._replace(H=2048), dict(block_k=512), 1),
        (PROBLEM._replace(H=2048), dict(block_k=1024), 1),
        (PROBLEM._replace(H=2048, precision="tf32"), {}, 6),
        (PROBLEM._replace(H=2048, precision="fp32"), {}, 1),
        (PROBLEM, dict(block_b=64), 1),
        (PROBLEM, dict(slices=2), 1),
        (PROBLEM, dict(resident=False), 1),
    ):
        assert chunks_in_flight(problem, dataclasses.replace(plan, **changes)) == expected, (problem, changes)


def test_registers_by_hand():
    plan = Plan("flag", True, True, 16, 16, 128, 1, 1, 4)  # 128 threads
    for problem, changes, expected in (
        (PROBLEM, {}, (8, 32, 0, 32, 2)),
        (PROBLEM, dict(warps=8), (4, 32, 0, 16, 1)),
        (PROBLEM, dict(slices=4), (32, 8, 128, 32, 2)),  # weights stay in registers
        (PROBLEM, dict(slices=2), (16, 16, 128, 32, 2)),
        (PROBLEM, dict(resident=False), (8, 32, 32, 0, 2)),
        (PROBLEM._replace(precision="tf32"), {}, (16, 64, 0, 64, 2)),
        (PROBLEM._replace(precision="tf32"), dict(slices=4), (32, 16, 256, 64, 2)),
        (PROBLEM._replace(precision="fp32"), {}, (32, 128, 0, 128, 2)),
        (PROBLEM._replace(backward=True), dict(slices=4), (8, 8, 0, 128, 2)),
        (PROBLEM._replace(backward=True), dict(splits=2), (2, 32, 0, 64, 1)),
    ):
        assert held(problem, dataclasses.replace(plan, **changes)) == expected, (problem, changes)


def test_what_fits_a_threads_registers_to_the_number():
    """The most that is known to fit, and twice that: sizes are powers of 2."""
    plan = Plan("barrier", True, True, 16, 16, 128, 1, 1, 4)
    a100, wide = PROBLEM._replace(device=GPUS["A100"], H=1024), PROBLEM._replace(H=1024)
    for problem, fits, too_much, reason in (
        (a100, dict(block_h=64), dict(block_h=128), "64 in sums"),
        (a100, dict(block_k=1024), dict(block_k=2048), "512 in rows"),
        (a100, dict(resident=False, block_h=32), dict(resident=False, block_h=64), "128 in weights"),
        (a100._replace(H=4096), dict(block_h=8), dict(block_h=8, block_b=32), "512 in all rows"),
        (a100._replace(backward=True), dict(block_h=256), dict(block_h=512), "64 in sums"),
        (PROBLEM._replace(H=256), dict(block_b=64), dict(block_b=64, block_h=32), "64 in sums"),  # on wgmma
        (PROBLEM, dict(block_b=64, block_k=512, warps=8), dict(block_b=64, block_k=1024, warps=8), "1024 in rows"),
        (wide, dict(slices=2, block_h=16, warps=8), dict(slices=2, block_h=16, block_k=256), "256 in weights"),
        (wide, dict(slices=4, block_h=16, warps=8), dict(slices=4, block_h=16), "256 in weights"),
        (wide._replace(backward=True), dict(slices=4), dict(slices=4, block_h=128), "16 in units"),
    ):
        assert _spills(problem, dataclasses.replace(plan, **fits)) is None, (problem, fits)
        assert _spills(problem, dataclasses.replace(plan, **too_much)) == reason, (problem, too_much)


def test_the_flag_keeps_the_addresses_of_rows():
    plan = Plan("flag", True, True, 16, 32, 128, 1, 1, 4)  # 16 sums
    wide = PROBLEM._replace(device=GPUS["A100"], H=4096, backward=True)
    for H, block_h, kept in ((1024, 256, False), (1024, 512, True), (2048, 256, True), (2048, 128, False)):
        for exchange in ("flag", "barrier"):
            found = _spills(wide._replace(H=H), dataclasses.replace(plan, exchange=exchange, block_h=block_h))
            assert ("addresses" in (found or "")) == (kept and exchange == "flag"), (H, block_h, exchange)
    few_weights = Plan("flag", True, True, 16, 16, 128, 4, 1, 4)  # 32 sums and 128 weights
    assert _spills(PROBLEM, few_weights) is None
    assert "addresses" in _spills(PROBLEM._replace(H=1024), few_weights)


def test_where_the_flag_has_room_for_addresses(monkeypatch):
    """With no more than 32 sums; with 16 where rows or weights take more than these."""
    plan = Plan("flag", True, True, 16, 16, 64, 1, 1, 4)
    for sums, weights, all_rows, kept in (
        (32, 128, 256, False), (32.5, 128, 256, True),
        (16, 128.5, 256, False), (16.5, 128.5, 256, True),
        (16, 128, 256.5, False), (16.5, 128, 256.5, True),
    ):  # fmt: skip
        needed = Held(sums=sums, rows=0, weights=weights, all_rows=all_rows, units=0)
        monkeypatch.setattr(limits, "held", lambda problem, plan, needed=needed: needed)
        assert ("addresses" in (_spills(PROBLEM, plan) or "")) == kept, needed


def test_a_program_that_is_alone_holds_all_weights():
    """64 KiB of them with 4 warps, as often as it has tiles of 16 rows."""
    alone = Plan("none", True, True, 16, 64, 64, 1, 1, 4)
    small = PROBLEM._replace(H=64)
    assert _spills(small, alone) is None
    for problem, changes in (
        (small, dict(block_b=64)),
        (small._replace(precision="fp32"), {}),
        (small, dict(block_h=128, block_k=128)),
    ):
        assert _spills(problem, dataclasses.replace(alone, **changes)) == "it holds all weights"
    assert _spills(small, dataclasses.replace(alone, block_b=32, warps=4)) is None
    assert _spills(small, dataclasses.replace(alone, block_b=64, warps=8)) is None


def test_three_products_need_eight_warps_and_few_rows():
    plan = Plan("barrier", True, True, 16, 16, 64, 1, 1, 8)
    exact = PROBLEM._replace(precision="fp32")
    assert _spills(exact, plan) is None
    for changes in (dict(warps=4), dict(block_b=32)):
        assert "three products" in _spills(exact, dataclasses.replace(plan, **changes))
        assert _spills(PROBLEM, dataclasses.replace(plan, **changes)) is None
