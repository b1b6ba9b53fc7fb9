"""The arithmetic of reports, against cases computed by hand, and PyTorch's choice of a cuDNN algorithm."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from triton_lstm.perf.cases import MODES, SUITES, Case
from triton_lstm.perf.cudnn import algorithm, algorithm_name, takes_bf16
from triton_lstm.perf.work import Floors, fewest_programs, flops, least_bytes, segments_of, step_us, weights
from triton_lstm.perf.work import floor_ms as floor

H200, A40, A30, V100 = ((9, 0), 132), ((8, 6), 84), ((8, 0), 56), ((7, 0), 80)
T4, GTX1080, KEPLER = ((7, 5), 40), ((6, 1), 20), ((3, 5), 15)
PLAIN = Case("fp16", T=3, B=2, I=5, H=4)  # 6 tokens


def test_flops_by_hand():
    # a token: (4*4, 5) @ (5,) and (4*4, 4) @ (4,), two operations a multiply-add
    assert flops(PLAIN, "inference") == flops(PLAIN, "forward") == 6 * 2 * 16 * (5 + 4) == 1728
    assert flops(PLAIN, "backward") == 2 * 1728  # dx and dW_ih, dh and dW_hh
    assert flops(PLAIN, "forward_backward") == flops(PLAIN, "graph_step") == 3 * 1728


def test_flops_of_layers_directions_and_projection_by_hand():
    case = Case("bf16", T=3, B=2, I=5, H=4, layers=2, bidirectional=True, proj_size=3)
    # two directions; the first layer reads 5, the second 2 * 3; each recurs over 3 and projects 4 to 3
    token = 2 * (2 * 16 * (5 + 3) + 2 * 4 * 3) + 2 * (2 * 16 * (6 + 3) + 2 * 4 * 3)
    assert flops(case, "inference") == 6 * token


def test_packed_lengths_are_spread():
    lengths = Case("fp16", T=1000, B=20_000, H=4, packed=True).lengths().double()
    logs = (lengths / 1000).log()
    assert abs(logs.median().item() - -0.5 * 1.645) < 0.02 and 0.04 < (lengths == 1000).double().mean() < 0.06
    assert abs(lengths.mean().item() / 1000 - 0.49) < 0.02


def test_packed_counts_only_existing_rows():
    case = Case("fp16", T=100, B=16, H=4, packed=True)
    lengths = case.lengths()
    assert lengths[0] == 100 and lengths[-1] < 40 and (lengths.diff() <= 0).all() and lengths.min() >= 1
    assert lengths.tolist() == case.lengths().tolist()
    assert flops(case, "inference") == int(lengths.sum()) * 2 * 16 * 8


def test_bytes_by_hand():
    assert weights(PLAIN) == 16 * 5 + 16 * 4 + 16 + 16 == 176
    read_and_written = 6 * 5 + 176 + 6 * 4  # input, weights, output
    assert least_bytes(PLAIN, "inference") == 2 * read_and_written
    assert least_bytes(PLAIN, "backward") == 2 * 2 * read_and_written
    assert least_bytes(Case("fp32", T=3, B=2, I=5, H=4), "inference") == 4 * read_and_written


@pytest.mark.parametrize("precision, dtype_bytes", [("fp16", 2), ("bf16", 2), ("tf32", 4), ("fp32", 4)])
def test_bytes_follow_the_dtype(precision, dtype_bytes):
    case = Case(precision, T=1, B=1, H=1)
    assert least_bytes(case, "inference") == dtype_bytes * (1 + 16 + 1)


DEVICE = Floors(
    copy_gbs=4000,
    tflops={"fp16": 500.0, "fp32": 50.0},
    exchange_us={2: 0.5, 16: 0.75, 128: 1.0},
    processors=132,
    on_chip_bytes=200_000,
)


def test_fewest_programs_by_hand():
    assert fewest_programs(Case("fp16", T=1, B=1, H=128), DEVICE) == 1  # 131,072 bytes
    assert fewest_programs(Case("fp16", T=1, B=1, H=256), DEVICE) == 3  # 524,288
    assert fewest_programs(Case("fp32", T=1, B=1, H=256), DEVICE) == 6
    assert fewest_programs(Case("fp16", T=1, B=1, H=4096), DEVICE) == 132  # does not fit


def test_step_by_hand():
    # H=256 needs 3 programs: an exchange costs at least what that of 2 costs. 8 rows x 15 programs share the product
    case = Case("fp16", T=1, B=8, H=256)
    product = 8 * 2 * 4 * 256 * 256 / 500e12 * 1e6
    assert step_us(case, DEVICE) == pytest.approx(0.5 + product * 132 / 120)
    # H=64 needs one, which exchanges nothing; with one row it has the whole product to itself
    small = Case("fp16", T=1, B=1, H=64)
    assert step_us(small, DEVICE) == pytest.approx(2 * 4 * 64 * 64 / 500e12 * 1e6 * 132)
    # One row of H=128 does better on many: 0.5 us for a tenth of the product is a good trade once that is long
    slow = dataclasses.replace(DEVICE, tflops={"fp16": 1.0})
    assert step_us(Case("fp16", T=1, B=1, H=128), slow) == pytest.approx(0.75 + 2 * 4 * 128 * 128 / 1e6 * 132 / 127)


def test_step_where_not_even_all_programs_hold_the_weights():
    # H=1900 needs 145 of 132 programs
    product = 256 * 2 * 4 * 1900 * 1900 / 500e12 * 1e6
    assert step_us(Case("fp16", T=1, B=256, H=1900), DEVICE) == pytest.approx(1.0 + product)


@given(st.integers(1, 3000), st.integers(1, 300), st.integers(2, 132))
def test_more_measured_exchanges_never_lower_the_floor(H, B, programs):
    case = Case("fp16", T=1, B=B, H=H)
    between = float(np.interp(programs, [*DEVICE.exchange_us], [*DEVICE.exchange_us.values()]))
    less, more = ({}, DEVICE.exchange_us | {programs: between})
    steps = [step_us(case, dataclasses.replace(DEVICE, exchange_us=us)) for us in (less, DEVICE.exchange_us, more)]
    assert steps == sorted(steps)


def test_floor_is_the_longest_of_three():
    chain = Case("fp16", T=1000, B=8, H=256)
    assert floor(chain, "inference", DEVICE) == pytest.approx(1000 * step_us(chain, DEVICE) / 1e3)
    assert floor(chain, "forward_backward", DEVICE) == pytest.approx(2 * floor(chain, "inference", DEVICE))
    stack = Case("fp16", T=1000, B=8, H=256, layers=3)
    assert floor(stack, "inference", DEVICE) == pytest.approx(1002 * step_us(stack, DEVICE) / 1e3)
    wide = Case("fp16", T=2, B=4096, I=1 << 16, H=256)
    assert floor(wide, "inference", DEVICE) == pytest.approx(flops(wide, "inference") / 500e12 * 1e3)
    thin = Case("fp16", T=2, B=8, I=1 << 20, H=8)
    assert floor(thin, "inference", DEVICE) == pytest.approx(least_bytes(thin, "inference") / 4000e9 * 1e3)
    assert math.isnan(floor(chain, "host_inference", DEVICE))


def test_segments_are_a_shorter_chain():
    whole, split = (Case("fp16", T=1000, B=8, H=256, resets=resets) for resets in (0.0, 0.01))
    assert segments_of(whole).tolist() == [1000] * 8
    lengths = segments_of(split).tolist()
    assert len(lengths) == 8 + 80 and sum(lengths) == 8000 and max(lengths) < 600
    assert floor(whole, "inference", DEVICE) == floor(Case("fp16", T=1000, B=8, H=256), "inference", DEVICE)
    # 88 segments of 3 programs each fill all processors, which have as many rows a step as the longest leaves
    step = 0.5 + 8000 / max(lengths) * 2 * 4 * 256 * 256 / 500e12 * 1e6
    assert step_us(split, DEVICE) == pytest.approx(step)
    assert floor(split, "inference", DEVICE) == pytest.approx(max(lengths) * step / 1e3)
    for mode in ("inference", "backward"):
        assert (flops(split, mode), least_bytes(split, mode)) == (flops(whole, mode), least_bytes(whole, mode))


def lstm(precision="fp16", **fields):
    return Case(precision, **(dict(T=128, B=16, H=512) | fields))


@pytest.mark.parametrize(
    "case, gpu, there, back",
    [
        (lstm(), H200, "PERSIST_STATIC", "PERSIST_STATIC"),
        (lstm(H=128), H200, "PERSIST_STATIC_SMALL_H", "PERSIST_STATIC_SMALL_H"),
        (lstm(H=129), H200, "PERSIST_STATIC_SMALL_H", "STANDARD"),
        (lstm(H=192), H200, "PERSIST_STATIC_SMALL_H", "STANDARD"),
        (lstm(H=193), H200, "STANDARD", "STANDARD"),
        (lstm(H=256), H200, "PERSIST_STATIC", "PERSIST_STATIC"),
        (lstm(H=1024), H200, "PERSIST_STATIC", "PERSIST_STATIC"),
        (lstm(H=1152), H200, "STANDARD", "STANDARD"),
        (lstm(H=650), H200, "STANDARD", "STANDARD"),
        (lstm(I=100), H200, "STANDARD", "STANDARD"),
        (lstm(B=8), H200, "PERSIST_STATIC", "PERSIST_STATIC"),
        (lstm(B=12), H200, "STANDARD", "STANDARD"),
        (lstm(B=128), H200, "PERSIST_STATIC", "PERSIST_STATIC"),
        (lstm(B=136), H200, "STANDARD", "STANDARD"),
        (lstm(layers=2), H200, "STANDARD", "STANDARD"),
        (lstm(bidirectional=True), H200, "STANDARD", "STANDARD"),
        (lstm(H=128, layers=2, bidirectional=True), H200, "PERSIST_STATIC_SMALL_H", "PERSIST_STATIC_SMALL_H"),
        (lstm(H=128, packed=True), H200, "STANDARD", "STANDARD"),
        (lstm(H=128, proj_size=64), H200, "STANDARD", "STANDARD"),
        (lstm(resets=0.01), H200, "STANDARD", "STANDARD"),
        (lstm(resets=0.0), H200, "PERSIST_STATIC", "PERSIST_STATIC"),  # not split
        (lstm("bf16"), H200, "STANDARD", "STANDARD"),
        (lstm("bf16", H=128), H200, "PERSIST_STATIC_SMALL_H", "PERSIST_STATIC_SMALL_H"),
        (lstm("tf32"), H200, "STANDARD", "STANDARD"),
        (lstm("fp32", H=192), H200, "PERSIST_STATIC_SMALL_H", "STANDARD"),
        (lstm("fp64", H=64), H200, "STANDARD", "STANDARD"),
        (lstm(), A40, "STANDARD", "STANDARD"),
        (lstm(), ((8, 6), 108), "STANDARD", "STANDARD"),
        (lstm(), A30, "STANDARD", "STANDARD"),
        (lstm(), ((12, 0), 170), "PERSIST_STATIC", "PERSIST_STATIC"),
        (lstm(), T4, "STANDARD", "STANDARD"),
        (lstm(), V100, "PERSIST_STATIC", "PERSIST_STATIC"),
        (lstm(B=80), V100, "STANDARD", "STANDARD"),
        (lstm(B=8, T=10), V100, "PERSIST_STATIC", "PERSIST_STATIC"),
        (lstm(B=8, T=9), V100, "STANDARD", "STANDARD"),
        (lstm(B=96, T=19), V100, "STANDARD", "STANDARD"),
        (lstm(B=96, T=20), V100, "PERSIST_STATIC", "PERSIST_STATIC"),
        (lstm(B=128, T=39), V100, "STANDARD", "STANDARD"),
        (lstm(B=128, T=40), V100, "PERSIST_STATIC", "PERSIST_STATIC"),
        (lstm(), GTX1080, "STANDARD", "STANDARD"),
        (lstm(H=128), GTX1080, "PERSIST_STATIC_SMALL_H", "PERSIST_STATIC_SMALL_H"),
        (lstm(H=128), KEPLER, "STANDARD", "STANDARD"),
    ],
)
def test_algorithm(case, gpu, there, back):
    assert algorithm(case, *gpu, forward=True) == there
    assert algorithm(case, *gpu, forward=False) == back


@pytest.mark.parametrize(
    "torch_version, cudnn, capability, expected",
    [
        ("2.11.0+cu130", 91300, (9, 0), True),
        ("2.13.0", 92000, (8, 0), True),
        ("2.9.1+cu128", 91300, (9, 0), False),
        ("2.11.0", 91200, (9, 0), False),
        ("2.11.0", 91300, (7, 5), False),
        ("2.13.0+cpu", None, (9, 0), False),
    ],
)
def test_takes_bf16(torch_version, cudnn, capability, expected):
    assert takes_bf16(torch_version, cudnn, capability) is expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN needs a GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32", "fp64"])
def test_pytorch_takes_the_predicted_path(precision):
    """Checks what PyTorch calls; the algorithm inside of cuDNN is not visible."""
    case = Case(precision, T=4, B=8, H=256)

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(function.name())
            return function(*args, **(kwargs or {}))

    names: set[str] = set()
    module = torch.nn.LSTM(case.I, case.H).to("cuda", case.dtype)
    with torch.no_grad(), Calls():
        module(torch.zeros(case.T, case.B, case.I, device="cuda", dtype=case.dtype))
    assert ("aten::_cudnn_rnn" in names) == (algorithm_name(case, "inference") != "step by step")


@pytest.mark.parametrize("suite", SUITES)
def test_suites(suite):
    cases = SUITES[suite]()
    assert len({case.name for case in cases}) == len(cases)
    assert all(case.why and case.modes and set(case.modes) <= set(MODES) for case in cases)


def test_standard_crosses_the_borders_of_cudnns_boxes():
    cases = SUITES["standard"]()
    for field, values in {
        "precision": {"fp16", "bf16", "tf32", "fp32"},
        "H": {64, 128, 192, 256, 512, 650, 768, 1024, 1500, 2048},
        "B": {1, 8, 16, 64, 128, 256},
        "T": {128, 1024},
        "layers": {1, 2, 4},
        "bidirectional": {False, True},
        "packed": {False, True},
        "batch_first": {False, True},
    }.items():
        assert values <= {getattr(case, field) for case in cases}, field
    assert any(case.proj_size for case in cases)
    usual = [case for case in cases if (case.precision, case.T, case.B, case.H) == ("bf16", 128, 64, 512)]
    assert {None, 0.0, 0.001, 0.01, 0.1} <= {case.resets for case in usual}
    assert {mode for case in cases for mode in case.modes} == set(MODES)
    found = {tuple(algorithm(case, *H200, forward=f) for f in (True, False)) for case in cases}
    assert len(found) == 4  # both persistent kernels, standard, and small-H forward alone


def test_full_holds_standard_and_the_plane():
    full = SUITES["full"]()
    assert full[: len(SUITES["standard"]())] == SUITES["standard"]()
    plane = {(case.precision, case.T, case.H, case.B) for case in full}
    assert len(plane) >= 4 * 2 * 10 * 6 and {("fp32", 1024, 1500, 256), ("bf16", 128, 64, 1)} <= plane
