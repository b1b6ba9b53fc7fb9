"""Plans for machines that are not here, and the kernels' signatures."""

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from triton_lstm.plan import INTERPRETER, Device, make_plan, shared_bytes

H200 = Device("cuda", 132, 232448)
SMALL_GPU = Device("cuda", 6, 65536)  # a laptop's: programs that wait for each other must be few
MI300X = Device("hip", 304, 65536)


@given(
    st.sampled_from([H200, SMALL_GPU, MI300X, Device("cuda", 1, 49152), Device("cuda", 58, 101376)]),
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
        assert programs * groups <= device.processors  # or the programs would wait for one that never starts
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
    assert make_plan(H200, 2, 16, 128, False).exchange == "none"
    assert make_plan(H200, 4, 16, 64, True).exchange == "none"
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
    wide = make_plan(INTERPRETER, 4, 1000, 2048, False)  # a tile may have 2**20 elements
    assert 4 * wide.block_h * max(wide.block_k, wide.block_b) <= 1 << 20 and not wide.one_launch


@pytest.mark.parametrize("name", ["lstm_forward_kernel", "lstm_backward_kernel"])
def test_at_most_20_run_time_arguments(name):
    import triton_lstm.kernels

    kernel = getattr(triton_lstm.kernels, name)
    annotations = kernel.fn.__annotations__
    run_time = [arg for arg in kernel.arg_names if "constexpr" not in str(annotations.get(arg, ""))]
    assert 0 < len(run_time) <= 20, run_time
