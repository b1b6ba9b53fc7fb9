"""What a launch does when the device says no, and which precision it asks for."""

import ast
import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from triton.runtime.errors import OutOfResources

import triton_lstm
import triton_lstm.kernels.launch as launch
from triton_lstm.planning.plan import Plan
from triton_lstm.settings import precision_name, spin_limit

FLAG = Plan("flag", True, True, 16, 16, 32, 1, 1, 4)
DEVICE = torch.device("cuda", 0)
GRID = (3, 1, 1)


@pytest.fixture(autouse=True)
def _nothing_refused(monkeypatch):
    monkeypatch.setattr(launch, "_refused", set())


@pytest.mark.parametrize(
    "constants",
    [FLAG.tile, launch.Layer.of("flag", torch.float16, 32, 1, "ieee", 0, False, "cuda")],
    ids=["tile", "layer"],
)
def test_every_constant_is_in_the_keys_of_tritons_caches(constants):
    """Compiled kernels are kept by hash and equality in memory, by text on disk."""
    for field in dataclasses.fields(constants):
        other = dataclasses.replace(constants, **{field.name: "another"})
        assert other != constants and hash(other) != hash(constants) and str(other) != str(constants)


def test_no_function_of_a_kernel_refers_to_any():
    """Which is no class in Python 3.10: Triton refuses to compile such a kernel there."""
    files = Path(launch.__file__).parent.glob("*.py")
    functions = [
        node
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and any("triton." in ast.unparse(d) for d in node.decorator_list)
    ]
    names = {f.name: {n.id for n in ast.walk(f) if isinstance(n, ast.Name)} for f in functions}
    assert {"lstm_forward_kernel", "looks_by_thread"} <= names.keys()
    assert not [name for name, used in names.items() if "Any" in used]


@pytest.mark.parametrize(
    "refusal",
    [
        RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch"),
        RuntimeError("Triton Error [CUDA]: operation not supported"),
        AssertionError("Cooperative launch requested but not supported by device"),
    ],
    ids=str,
)
def test_a_refused_cooperative_launch_goes_step_by_step(refusal):
    calls = []

    def launcher(step_begin, step_end, launch_cooperative_grid=False):
        calls.append((step_begin, step_end))
        if launch_cooperative_grid:
            raise refusal

    with pytest.warns(UserWarning, match="refused a cooperative launch"):
        launch._launch_steps(launcher, FLAG, GRID, 3, {}, DEVICE)
    assert calls == [(0, 3), (0, 1), (1, 2), (2, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch._launch_steps(launcher, FLAG, GRID, 2, {}, DEVICE)  # not asked a second time, and no second warning
    assert calls[4:] == [(0, 1), (1, 2)]


def test_two_directions_refused_together_are_launched_one_after_the_other(device, monkeypatch):
    """And another grid of the same plan is still tried."""
    plan, grids = Plan("flag", False, True, 16, 16, 32, 1, 1, 4), []
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: plan)
    monkeypatch.setattr(launch, "directions_at_once", lambda problem, plan: problem.directions)
    monkeypatch.setattr(launch, "_prepared", launch._prepared.__wrapped__)
    shipped = launch._launch_steps

    def spy(launcher, plan, grid, *rest):
        grids.append(grid)
        shipped(launcher, plan, grid, *rest)

    monkeypatch.setattr(launch, "_launch_steps", spy)
    module, x = (
        triton_lstm.LSTM(4, 40, bidirectional=True, backend="triton").to(device),
        torch.randn(2, 3, 4).to(device),
    )
    with torch.no_grad():
        together = module(x)[0]
        launch._refused.add((x.device, plan, (3, 1, 2)))
        assert torch.equal(module(x)[0], together)
    assert grids == [(3, 1, 2), (3, 1, 1), (3, 1, 1)]


def test_another_error_is_not_swallowed():
    def launcher(**_):
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        launch._launch_steps(launcher, FLAG, GRID, 3, {}, DEVICE)


def test_step_by_step_no_sum_is_split(device, monkeypatch):
    """Programs that split a sum wait for each other within a step: they would hang."""
    plan = Plan("flag", False, True, 16, 32, 32, 1, 1, 4, splits=2)
    seen, shipped = [], launch._launch_steps

    def spy(launcher, plan, grid, steps, arguments, device):
        def launched(**arguments):
            seen.append((grid, arguments["TILE"], arguments.get("parts_ptr")))
            launcher(**arguments)

        shipped(launched, plan, grid, steps, arguments, device)

    monkeypatch.setattr(launch, "_launch_steps", spy)
    torch.manual_seed(0)
    module, twin = triton_lstm.LSTM(4, 40, backend="triton").to(device), nn.LSTM(4, 40).to(device)
    twin.load_state_dict(module.state_dict())
    x, alone = torch.randn(3, 2, 4, device=device), Plan("none", True, True, 16, 64, 64, 1, 1, 4)
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: plan if backward else alone)
    for m in (module, twin):
        m(x)[0].square().sum().backward()
    for (name, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    assert seen[1:] == [((4, 1, 1), plan.on_one_axis.tile, None)] * 3 and plan.on_one_axis.block_h == 16


def test_too_large_a_plan_is_streamed(device, monkeypatch):
    """The compiler may need more than the plan's estimate: the weights leave the chip, the answer stays."""
    plan = Plan("flag", torch.cuda.is_available(), True, 16, 16, 32, 2, 1, 4)
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: plan)
    shipped, seen = launch._launch_steps, []

    def short(launcher, plan, grid, steps, arguments, device):
        seen.append(arguments["TILE"].RESIDENT)
        if plan.resident:
            raise OutOfResources(300_000, 232_448, "shared memory")
        shipped(launcher, plan, grid, steps, arguments, device)

    monkeypatch.setattr(launch, "_launch_steps", short)
    torch.manual_seed(0)
    module, twin = triton_lstm.LSTM(4, 40, backend="triton").to(device), nn.LSTM(4, 40).to(device)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(3, 2, 4, device=device)
    with pytest.warns(UserWarning, match="its weights are streamed"):
        torch.testing.assert_close(module(x)[0], twin(x)[0], rtol=1e-4, atol=1e-4)
    assert seen == [True, False]


def test_float32_follows_the_switch_of_cudnns_rnns(monkeypatch):
    for allowed, expected in ((True, "tf32"), (False, "tf32x3")):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert launch.product_precision(torch.float32, DEVICE) == expected
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    try:  # monkeypatch would delete it, which PyTorch 2.9 does not allow
        for precision, expected in (("tf32", "tf32"), ("ieee", "tf32x3"), ("none", "tf32x3")):
            rnn.fp32_precision = precision
            assert launch.product_precision(torch.float32, DEVICE) == expected
    finally:
        rnn.fp32_precision = before
    assert launch.product_precision(torch.bfloat16, DEVICE) == "ieee"
    assert launch.product_precision(torch.float32, torch.device("cpu")) == "ieee"


def test_float32s_precision_can_be_chosen(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for chosen, name in (("tf32", "tf32"), ("tf32x3", "fp32"), ("ieee", "fp32"), ("", "tf32")):
        monkeypatch.setenv("TRITON_LSTM_FP32", chosen)
        assert launch.product_precision(torch.float32, DEVICE) == (chosen or "tf32")
        assert precision_name(torch.float32, DEVICE) == name
        assert launch.product_precision(torch.bfloat16, DEVICE) == "ieee"
    monkeypatch.setenv("TRITON_LSTM_FP32", "fp32")
    with pytest.raises(ValueError, match='must be "tf32", "tf32x3" or "ieee", got \'fp32\''):
        launch.product_precision(torch.float32, DEVICE)


@pytest.mark.parametrize("text", ["abc", "-1", "1.5", "99999999999", "²"])
def test_a_bad_spin_limit_is_named(text, monkeypatch):
    monkeypatch.setenv("TRITON_LSTM_SPIN_LIMIT", text)
    with pytest.raises(ValueError, match=r"TRITON_LSTM_SPIN_LIMIT must be an integer"):
        spin_limit()
