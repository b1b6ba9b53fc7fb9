"""The tolerance of every comparison: what passes, and what it detects."""

import numpy as np
import pytest
import torch
from oracle import assert_like_nn_lstm, run, state_shapes
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import triton_lstm
from triton_lstm.core.reference import Reference
from triton_lstm.core.tolerance import Allowance, enlarge, errors, worst_share
from triton_lstm.operator import layer, projection
from triton_lstm.operator.arguments import LayerArguments
from triton_lstm.operator.layer import layer_gradients

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
sensitive = pytest.mark.sensitive


def compare(device, dtype, T, B, H, packed=False, **kwargs):
    """assert_like_nn_lstm on a module of these sizes, with states."""
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("float64 on a GPU goes to PyTorch's own LSTM")
    torch.manual_seed(0)
    module = enlarge(triton_lstm.LSTM(3, H, **kwargs, backend="triton")).to(device, dtype)

    def draw():
        x = torch.randn(T, B, 3).to(device, dtype)
        x = pack_sequence([x[: T - b, b] for b in range(B)]) if packed else x
        return x, tuple(torch.randn(shape).to(device, dtype) for shape in state_shapes(module, B))

    assert_like_nn_lstm(module, draw, **kwargs)


@sensitive
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_correct_results_pass(dtype, packed, device):
    compare(device, dtype, 5, 3, 8, packed, num_layers=2, bidirectional=True)
    compare(device, dtype, 5, 3, 8, packed, proj_size=4)


def changed(function, change):
    """`function` with `change` applied to what it returns."""
    return lambda *args, **kwargs: change(function(*args, **kwargs), *args)


def swapped(results, *_):
    """The outputs of two sequences, swapped."""
    y = results[0].clone()
    y[:, [0, 1]] = y[:, [1, 0]]
    return y, *results[1:]


def dropped(results, *_):
    """The output of one step, repeated at the next."""
    y = results[0].clone()
    y[2] = y[1]
    return y, *results[1:]


@sensitive
@pytest.mark.parametrize("fault", [swapped, dropped])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_swapped_row_and_a_dropped_step(dtype, fault, device, monkeypatch):
    monkeypatch.setattr(layer, "lstm_forward", changed(layer.lstm_forward, fault))
    with pytest.raises(AssertionError, match="times the error that is allowed"):
        compare(device, dtype, 5, 3, 8)


@sensitive
@pytest.mark.parametrize("gate", range(4), ids="ifgo")
def test_a_thousandth_of_one_gates_gradient(gate, device, monkeypatch):
    def off(results, *_):
        dgates = results[0].clone()
        dgates.unflatten(-1, (4, -1))[..., gate, :] *= 1 + 1e-3
        return dgates, results[1]

    monkeypatch.setattr(layer, "lstm_backward", changed(layer.lstm_backward, off))
    with pytest.raises(AssertionError, match=r"^d.* times the error that is allowed"):
        compare(device, torch.float32, 5, 3, 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels do their own rounding")
def test_truncation_instead_of_rounding(device, monkeypatch):
    import triton_lstm.kernels.interpreter as interpreter

    def truncated(data):
        return (np.ascontiguousarray(data, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)

    monkeypatch.setattr(interpreter, "_round", truncated)
    with pytest.raises(AssertionError, match="times the error that is allowed"):
        compare(device, torch.bfloat16, 63, 4, 64, num_layers=2, bidirectional=True)


def later_bias(results, x, w_ih, b_ih, *_):
    return results + b_ih


def other_end(function):
    return lambda data, directions, *where: function(data.flip(0), directions, *where)


def one_step_off(results, *_):
    return results[0], results[1].roll(1, 0)


HELPERS = {  # what the reference once shared with the kernels' path: the name, its mutant, and what shows it
    "preactivations": (layer, lambda f: changed(f, later_bias), {}),
    "last_rows": (projection, other_end, {"proj_size": 4}),
    "first_rows": (layer, other_end, {}),
    "successions": (layer, lambda f: changed(f, one_step_off), {}),
    "_initial_share": (layer, lambda f: changed(f, lambda share, *_: share.roll(1, 0)), {"packed": True}),
    "_joined": (projection, lambda f: changed(f, lambda weights, *_: weights * (1 + 1e-3)), {"proj_size": 4}),
}


@pytest.mark.parametrize("name", HELPERS)
def test_every_helper_that_the_reference_does_without(name, device, monkeypatch):
    """A fault in it affects ours only, and far exceeds the tolerance."""
    module, mutant, kwargs = HELPERS[name]
    monkeypatch.setattr(module, name, mutant(getattr(module, name)))
    with pytest.raises(AssertionError, match="times the error that is allowed"):
        compare(device, torch.float32, 5, 3, 8, **kwargs)


@pytest.mark.parametrize("packed, kwargs", [(True, {}), (False, {}), (False, {"proj_size": 4})])
def test_the_reference_shares_nothing(packed, kwargs, device, monkeypatch):
    """It agrees with nn.LSTM with every part of the kernels' path removed."""
    for module in ("core.packing", "operator.torch_layer", "operator.layer", "operator.projection", "stack"):
        owner = __import__(f"triton_lstm.{module}", fromlist=["x"])
        for name, value in list(vars(owner).items()):
            if getattr(value, "__module__", "").startswith("triton_lstm") and callable(value):
                monkeypatch.setattr(owner, name, None)
    torch.manual_seed(0)
    twin = nn.LSTM(3, 8, 2, bidirectional=True, **kwargs).double().to(device)
    reference = Reference(3, 8, 2, bidirectional=True, **kwargs).double().to(device)
    reference.load_state_dict(twin.state_dict())
    x: torch.Tensor = torch.randn(5, 3, 3, dtype=torch.float64, device=device)
    x = pack_sequence([x[:2, 0], x[:5, 1], x[:3, 2]], enforce_sorted=False) if packed else x
    hx = tuple(torch.randn(shape, dtype=torch.float64, device=device) for shape in state_shapes(twin, 3))
    torch.testing.assert_close(run(reference, x, hx), run(twin, x, hx), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", [{}, {"batch_first": True}, {"bias": False}, {"unbatched": True}], ids=str)
def test_the_reference_has_nn_lstms_layouts(layout, device):
    layout = dict(layout)
    unbatched = layout.pop("unbatched", False)
    twin = nn.LSTM(3, 8, **layout).double().to(device)
    reference = Reference(3, 8, **layout).double().to(device)
    reference.load_state_dict(twin.state_dict())
    x = torch.randn((5, 3) if unbatched else (5, 2, 3), dtype=torch.float64, device=device)
    torch.testing.assert_close(run(reference, x, None), run(twin, x, None), rtol=1e-12, atol=1e-13)


def test_a_wrong_reference(device, monkeypatch):
    """Twice the bias b_ih: an arbitrarily large own error, if it counted."""
    honest = Reference.__getattr__

    def twice(self, name):
        return 2 * honest(self, name) if name.startswith("bias_ih") else honest(self, name)

    monkeypatch.setattr(Reference, "__getattr__", twice)
    with pytest.raises(ValueError, match="the reference is wrong: in float64, its y of draw 0 is"):
        compare(device, torch.float32, 5, 3, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_no_tolerance_without_a_finite_own_error(value, place):
    exact = torch.ones(3, dtype=torch.float64)
    own = [torch.zeros(3, dtype=torch.float64) for _ in range(2)]
    assert worst_share(exact.float(), exact, errors(own)) == 0
    own[place][1] = value
    assert worst_share(exact.float() + 1, exact, errors(own)) == float("inf")
    same = [{"y": (exact + difference).float()} for difference in own]
    with pytest.raises(ValueError, match="own error of y is not finite"):
        Allowance([{"y": exact}] * 2, same)
    with pytest.raises(ValueError, match="own error of y is not finite"):
        Allowance([{"y": exact}] * 2, [{"y": exact.float()}] * 2, ([{"y": exact}] * 2, same))


def test_the_larger_of_both_errors_counts():
    exact = [{"y": torch.ones(3, dtype=torch.float64)}]
    near, far = ([{"y": torch.full((3,), 1 + off)}] for off in (1e-5, 1e-3))
    got = torch.full((3,), 1 + 1.9e-3)
    assert Allowance(exact, near).share("y", got) > 50
    for same, other in ((near, far), (far, near)):
        assert 0.9 < Allowance(exact, same, (exact, other)).share("y", got) < 1


@sensitive
def test_weight_gradients_over_long_sequences():
    """Sums over 20,000 rows, on the CPU: as close to float64 as nn.LSTM's own, by the tolerance."""
    T, B, H = 10_000, 2, 4
    torch.manual_seed(0)
    twin = nn.LSTM(H, H)
    x, dy = torch.randn(2, T, B, H)
    exact, same = ({}, {})
    for found, dtype in ((exact, torch.float64), (same, torch.float32)):
        twin.to(dtype)(x.to(dtype))[0].backward(dy.to(dtype))
        found |= {name: weight.grad for name, weight in twin.named_parameters()}
        twin.zero_grad()
    twin.double()
    xg = (x.double() @ twin.weight_ih_l0.t() + twin.bias_ih_l0).detach().requires_grad_()
    loop = nn.LSTM(4 * H, H).double()  # with the identity for W_ih, its input's gradients are those of the gates
    loop.load_state_dict(twin.state_dict() | {"weight_ih_l0": torch.eye(4 * H), "bias_ih_l0": torch.zeros(4 * H)})
    y, _ = loop(xg)
    y.backward(dy.double())
    dgates, y = xg.grad.float(), y.detach().float()
    w_ih, w_hh = (weight.detach().float() for weight in (twin.weight_ih_l0, twin.weight_hh_l0))
    arguments = LayerArguments(x, None, None, w_ih, w_hh, *torch.zeros(2, 4 * H))
    wanted = (False, False, False, True, True, True, True, False)
    grads = layer_gradients(dgates, torch.zeros(1, B, H), arguments, y, wanted=wanted)
    for name, got in (("weight_ih_l0", grads[3]), ("weight_hh_l0", grads[4]), ("bias_ih_l0", grads[5])):
        assert worst_share(got, exact[name], errors([same[name].double() - exact[name]])) <= 1, name


def test_a_gpus_sums_are_one_product():
    from torch._subclasses import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    for where, products in (("cuda", 1), ("cpu", 12)):
        seen: list[str] = []
        with FakeTensorMode(), Products():
            layer._over_rows(torch.empty(1500, 4, device=where), torch.empty(1500, 8, device=where))
        assert sum("mm" in name for name in seen) == products
