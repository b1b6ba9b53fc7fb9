"""Every output and every gradient of the module against nn.LSTM in the same dtype and in float64."""

import dataclasses

import pytest
import torch
from compiled import COMPILED
from gpus import problem_of, small_gpu
from oracle import assert_like_nn_lstm, state_shapes
from pairs import all_pairs, case_id

import triton_lstm
from triton_lstm.core.tolerance import enlarge, errors, worst_share
from triton_lstm.planning.devices import INTERPRETER
from triton_lstm.planning.plan import Plan
from triton_lstm.planning.space import make_plan

SIZES = [1, 5, 16, 33, 48, 64, 130]
FACTORS = {
    "T": [1, 2, 5, 33],
    "B": [1, 3, 16, 17],
    "H": SIZES,
    "I": SIZES,
    "dtype": [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    "layers": [1, 2],
    "both": [False, True],
    "bias": [False, True],
    "proj": [False, True],
    "hx": [False, True],
    "batch_first": [False, True],
}


def sensitive(case):
    """Few units from many inputs, in float32: seen to come nearest to what is allowed."""
    few = case["H"] < case["I"] and case["T"] <= 2 and case["dtype"] == torch.float32
    return pytest.param(case, id=case_id(case), marks=pytest.mark.sensitive if few else ())


@pytest.mark.unmeasured
@pytest.mark.parametrize("case", [sensitive(case) for case in all_pairs(FACTORS)])
def test_against_nn_lstm(case, device):
    if case["dtype"] == torch.float64 and COMPILED:
        pytest.skip("float64 on a GPU goes to PyTorch's own LSTM")
    kwargs = dict(
        num_layers=case["layers"],
        bidirectional=case["both"],
        bias=case["bias"],
        batch_first=case["batch_first"],
        proj_size=(case["H"] + 1) // 2 if case["proj"] and case["H"] > 1 else 0,
    )
    torch.manual_seed(0)
    module = enlarge(triton_lstm.LSTM(case["I"], case["H"], **kwargs, backend="triton")).to(device, case["dtype"])
    shape = (case["B"], case["T"]) if case["batch_first"] else (case["T"], case["B"])

    def draw():
        x = torch.randn(*shape, case["I"]).to(device, case["dtype"])
        return x, tuple(torch.randn(s).to(x) for s in state_shapes(module, case["B"])) if case["hx"] else None

    assert_like_nn_lstm(module, draw, **kwargs)


PLANS = {
    "exchange": ["flag", "barrier"],
    "resident": [True, False],
    "block_b": [16, 32],
    "block_h": [16, 32],
    "block_k": [32, 64],
    "slices": [1, 2],
    "groups": [1, 2],
    "warps": [4, 8],
    "T": [1, 2, 5],
    "B": [1, 3, 17, 40],
    "H": SIZES,
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "reverse": [False, True],
}


@pytest.mark.unmeasured
@pytest.mark.parametrize("case", all_pairs(PLANS), ids=case_id)
def test_several_programs(case, device, monkeypatch):
    """Every field of a plan; in the interpreter a launch per step, on a GPU all steps in one."""
    fields = ("exchange", "resident", "block_b", "block_h", "block_k", "slices", "groups", "warps")
    plan = Plan(**{name: case[name] for name in fields}, one_launch=COMPILED)
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: plan)
    torch.manual_seed(0)
    kwargs = dict(bidirectional=case["reverse"])
    module = enlarge(triton_lstm.LSTM(3, case["H"], **kwargs, backend="triton")).to(device, case["dtype"])

    def draw():
        x = torch.randn(case["T"], case["B"], 3).to(device, case["dtype"])
        return x, tuple(torch.randn(s).to(x) for s in state_shapes(module, case["B"]))

    assert_like_nn_lstm(module, draw, **kwargs)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38, -3e38, 1e4])
def test_extreme_inputs(value, device):
    """What nn.LSTM gives, and nothing of one row in another."""
    torch.manual_seed(0)
    module = triton_lstm.LSTM(4, 33, backend="triton").to(device)
    twin = torch.nn.LSTM(4, 33).to(device)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(5, 3, 4, device=device)
    x[2, 1, 0] = value
    got, expected = module(x)[0], twin(x)[0]
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=1e-2 if COMPILED else 1e-5)
    assert got[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_an_infinite_state(value, device):
    """H = 33 is padded to 64 units: inf times a padding weight must not come back as NaN."""
    torch.manual_seed(0)
    module = triton_lstm.LSTM(4, 33, backend="triton").to(device)
    twin = torch.nn.LSTM(4, 33).to(device)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(3, 2, 4, device=device)
    h0, c0 = torch.zeros(2, 1, 2, 33, device=device)
    h0[0, 0, 0] = value
    got, expected = module(x, (h0, c0))[0], twin(x, (h0, c0))[0]
    assert expected.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-2 if COMPILED else 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 is a GPU's")
def test_tf32(device, monkeypatch):
    """The default on a GPU, with TF32's eps in the rule."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.manual_seed(0)
    module, twin = triton_lstm.LSTM(128, 256, backend="triton").to(device), torch.nn.LSTM(128, 256).to(device)
    twin.load_state_dict(module.state_dict())
    exact = torch.nn.LSTM(128, 256).to(device, torch.float64)
    exact.load_state_dict(module.state_dict())
    x = torch.randn(20, 16, 128, device=device)
    reference = exact(x.double())[0]
    assert worst_share(module(x)[0], reference, errors([twin(x)[0] - reference]), tf32=True) <= 1


def test_empty_batch(device):
    module = triton_lstm.LSTM(4, 8, 2, backend="triton").to(device)
    x = torch.zeros(3, 0, 4, device=device, requires_grad=True)
    y, (h_n, c_n) = module(x)
    assert y.shape == (3, 0, 8) and h_n.shape == c_n.shape == (2, 0, 8)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


@pytest.mark.unmeasured
@pytest.mark.usefixtures("interpreter")  # other machines' plans, a launch per step
@pytest.mark.parametrize(
    "device_facts, B, H",
    [
        pytest.param(small_gpu(6, 49152), 70, 130, id="step-by-step"),
        pytest.param(small_gpu(16, 24000), 40, 100, id="streamed"),
        pytest.param(INTERPRETER, 256, 1024, id="large", marks=pytest.mark.sensitive),
        pytest.param(INTERPRETER, 2, 2048, id="wide"),
    ],
)
def test_beyond_what_fits_at_once(device_facts, B, H, monkeypatch):
    """Batch tiles taken in turn, weights loaded in every step, more programs than the device holds."""

    def plan(like, *_, backward):
        made = make_plan(problem_of(device_facts, like.element_size(), B, H, backward))
        return dataclasses.replace(made, one_launch=made.exchange == "none")

    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", plan)
    torch.manual_seed(0)
    module = triton_lstm.LSTM(4, H, backend="triton")
    assert_like_nn_lstm(module, lambda: (torch.randn(2, B, 4), None))
