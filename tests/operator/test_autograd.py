"""LSTMFunction: which gradients, when, how often, and PyTorch's usual errors."""

import itertools

import pytest
import torch
from compiled import COMPILED
from torch import nn

import triton_lstm
from triton_lstm.core.reference import lstm_reference
from triton_lstm.functional import lstm

NAMES = ["x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh"]
SHAPES = [(4, 2, 3), (2, 5), (2, 5), (20, 3), (20, 5), (20,), (20,)]


def tensors(device, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(s, dtype=torch.float64).to(device, dtype) for s in SHAPES]


def ours(*inputs):
    x, h0, c0, *params = inputs
    return tuple(
        out if k == 0 else out[0] for k, out in enumerate(lstm(x, (h0[None], c0[None]), params, backend="triton"))
    )


@pytest.mark.parametrize("wanted", [(n,) for n in NAMES] + list(itertools.combinations(NAMES, 3))[::5], ids="-".join)
def test_any_subset_of_gradients(wanted, device, precise):
    dtype, close = precise
    inputs = [t.requires_grad_(name in wanted) for name, t in zip(NAMES, tensors(device, dtype), strict=True)]
    asked = [t for t in inputs if t.requires_grad]
    cotangents = [torch.randn_like(out) for out in ours(*inputs)]
    got = torch.autograd.grad(ours(*inputs), asked, cotangents)
    expected = torch.autograd.grad(lstm_reference(*inputs), asked, cotangents)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **close)
    sum((out.sum() for out in ours(*inputs)), torch.zeros((), device=device)).backward()
    assert [t.grad is not None for t in inputs] == [t.requires_grad for t in inputs]


@pytest.mark.parametrize("used", [u for n in (1, 2, 3) for u in itertools.combinations(range(3), n)])
def test_any_subset_of_outputs(used, device, precise):
    dtype, close = precise
    inputs = [t.requires_grad_() for t in tensors(device, dtype)]

    def grads(function):
        outputs = function(*inputs)
        torch.manual_seed(1)
        return torch.autograd.grad(sum((outputs[k] * torch.randn_like(outputs[k])).sum() for k in used), inputs)

    for a, b in zip(grads(ours), grads(lstm_reference), strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_gates_are_kept_unless_they_are_recomputed(recompute, states, device):
    from triton_lstm.operator.arguments import LayerArguments
    from triton_lstm.operator.autograd import layer

    x, h0, c0, *params = (t.requires_grad_() for t in tensors(device, torch.float32))
    gates = layer(LayerArguments(x, h0[None], c0[None], *params), recompute=recompute, states=states)[3]
    assert (gates is None) == (recompute and not states)
    with torch.no_grad():
        gates = layer(LayerArguments(x, h0[None], c0[None], *params), recompute=recompute, states=states)[3]
    assert (gates is None) == (not states)


def test_gates_are_not_kept_under_a_transform_either(device, monkeypatch):
    import triton_lstm.operator.autograd as autograd

    saved, shipped = [], autograd.layer_forward
    monkeypatch.setattr(
        autograd, "layer_forward", lambda *args, **save: saved.append(save["save_gates"]) or shipped(*args, **save)
    )
    module = triton_lstm.LSTM(3, 5, recompute=True, backend="triton").to(device)
    torch.func.vjp(lambda x: module(x)[0], torch.randn(4, 2, 3, device=device))
    assert saved == [False]


def test_forward_mode_is_refused(device):
    module, x = triton_lstm.LSTM(3, 5, backend="triton").to(device), torch.randn(4, 2, 3, device=device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="no forward derivative"):
            module(dual)


def test_nothing_is_saved_without_gradients(device, monkeypatch):
    import triton_lstm.operator.autograd

    saves = []
    shipped = triton_lstm.operator.autograd.layer_forward
    monkeypatch.setattr(
        triton_lstm.operator.autograd,
        "layer_forward",
        lambda *inputs, **kwargs: saves.append(kwargs["save_c"]) or shipped(*inputs, **kwargs),
    )
    module = triton_lstm.LSTM(3, 5, backend="triton").to(device).requires_grad_(False)
    y, (h_n, c_n) = module(torch.randn(4, 2, 3, device=device))
    assert not (y.requires_grad or h_n.requires_grad or c_n.requires_grad)
    with torch.no_grad():
        assert module.requires_grad_()(torch.randn(4, 2, 3, device=device))[0].grad_fn is None
    assert saves == [False, False]
    module(torch.randn(4, 2, 3, device=device))
    assert saves == [False, False, True]


def test_frozen_weights_get_none_and_x_its_gradient(device):
    module = triton_lstm.LSTM(3, 5, backend="triton").to(device)
    module.weight_hh_l0.requires_grad_(False)
    x = torch.randn(4, 2, 3, device=device, requires_grad=True)
    module(x)[0].sum().backward()
    assert module.weight_hh_l0.grad is None and module.weight_ih_l0.grad is not None and x.grad is not None
    module.requires_grad_(False)
    x.grad = None
    module(x)[0].sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kwargs", [dict(), dict(bidirectional=True), dict(proj_size=2, num_layers=2)], ids=str)
def test_gradients_accumulate(kwargs, device):
    """Added up in place over two backward passes: no two gradients may be the same memory."""
    torch.manual_seed(0)
    module = triton_lstm.LSTM(3, 5, **kwargs, backend="triton").to(device)
    x = torch.randn(4, 2, 3, device=device)
    module(x)[0].square().sum().backward()
    once = [p.grad.clone() for p in module.parameters()]
    for factor in (2, 3):
        module(x)[0].square().sum().backward()
        for p, first in zip(module.parameters(), once, strict=True):
            torch.testing.assert_close(p.grad, factor * first)
    module.weight_hh_l0.grad.zero_()
    assert all(p.grad.any() for name, p in module.named_parameters() if name != "weight_hh_l0")


def test_weights_off_the_path_get_zeros(device):
    """As nn.LSTM: the loss looks at the first layer only, the second one's gradients are zeros, not None."""
    module = triton_lstm.LSTM(3, 5, 2, backend="triton").to(device)
    module(torch.randn(4, 2, 3, device=device))[1][0][0].sum().backward()
    assert module.weight_hh_l1.grad is not None and not module.weight_hh_l1.grad.any()
    assert module.weight_hh_l0.grad.any()


def test_backward_in_eval_mode(device):
    module = triton_lstm.LSTM(3, 5, 2, dropout=0.5, backend="triton").to(device).eval()
    x = torch.randn(4, 2, 3, device=device, requires_grad=True)
    module(x)[0].sum().backward()
    twin = nn.LSTM(3, 5, 2, dropout=0.5).eval()  # on the CPU: cuDNN refuses
    twin.load_state_dict(module.state_dict())
    same = x.detach().cpu().requires_grad_()
    twin(same)[0].sum().backward()
    torch.testing.assert_close(x.grad.cpu(), same.grad, rtol=1e-2, atol=1e-3 if COMPILED else 1e-6)


def test_second_backward_needs_retain_graph(device):
    inputs = [t.requires_grad_() for t in tensors(device, torch.float32)]
    y = ours(*inputs)[0]
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    again = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), inputs)


@pytest.mark.parametrize("changed", ["y", "w_hh", "w_ih", "x"])
def test_change_in_place_before_backward_is_an_error(changed, device):
    leaves = [t.requires_grad_() for t in tensors(device, torch.float32)]
    inputs = [t * 1 for t in leaves]
    y = ours(*inputs)[0]
    target = y if changed == "y" else inputs[NAMES.index(changed)]
    with torch.no_grad():
        target.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_outputs_share_no_memory(device):
    inputs = tensors(device, torch.float32)
    storages = [t.untyped_storage().data_ptr() for t in (*ours(*inputs), *inputs)]
    assert len(set(storages)) == len(storages)


def test_states_may_be_changed_in_place(device):
    """h_n and c_n are nobody's memory but their own: changing them leaves the gradients right."""
    inputs = [t.requires_grad_() for t in tensors(device, torch.float32)]
    x, h0, c0, *params = inputs
    y, h_n, c_n = lstm(x, (h0[None], c0[None]), params, backend="triton")
    expected = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    h_n.mul_(2)
    c_n.mul_(2)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y.sum(), inputs), expected, strict=True))


def test_same_inputs_same_bits(device):
    inputs = [t.requires_grad_() for t in tensors(device, torch.float32)]
    first, again = (torch.autograd.grad(sum(o.sum() for o in ours(*inputs)), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def small(device):
    torch.manual_seed(0)
    shapes = [(3, 2, 2), (2, 3), (2, 3), (12, 2), (12, 3), (12,), (12,)]
    return [torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in shapes]


def test_gradcheck(device):
    """Of the kernels where they run in float64, of the reference always."""
    assert torch.autograd.gradcheck(lstm_reference, small(device))
    if not COMPILED:
        assert torch.autograd.gradcheck(ours, small(device))


@pytest.mark.skipif(COMPILED, reason="the kernels have no float64 on a GPU")
def test_gradgradcheck(device):
    assert torch.autograd.gradgradcheck(ours, small(device), fast_mode=True)


def test_gradient_penalty(device, precise):
    """Loss plus penalty on the input gradient: cuDNN refuses it, @once_differentiable gets it silently wrong."""
    dtype, close = precise

    def grads(function):
        inputs = [t.requires_grad_() for t in tensors(device, dtype)]
        y = function(*inputs)[0]
        (dx,) = torch.autograd.grad(y.sum(), inputs[0], create_graph=True)
        (y.square().sum() + 10 * dx.square().sum()).backward()
        return [t.grad for t in inputs]

    for a, b in zip(grads(ours), grads(lstm_reference), strict=True):
        torch.testing.assert_close(a, b, **close)


def test_double_backward_of_a_projection_and_of_both_directions(device, precise):
    dtype, close = precise
    kwargs = dict(bidirectional=True, proj_size=2, num_layers=2)
    torch.manual_seed(0)
    module = triton_lstm.LSTM(3, 5, **kwargs, backend="triton").to(device, dtype)
    oracle = nn.LSTM(3, 5, **kwargs).to(dtype)  # on the CPU: cuDNN has no double backward
    oracle.load_state_dict(module.state_dict())
    x = torch.randn(4, 2, 3, dtype=dtype)

    def grads(m, x):
        x = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(m(x)[0].square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        return [x.grad, *(p.grad for p in m.parameters())]

    for a, b in zip(grads(module, x.to(device)), grads(oracle, x), strict=True):
        torch.testing.assert_close(a.cpu(), b, **close)


def test_double_backward_leaves_no_graph_unasked(device):
    inputs = [t.requires_grad_() for t in tensors(device, torch.float32)]
    (dx,) = torch.autograd.grad(ours(*inputs)[0].square().sum(), inputs[0], create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), inputs[3], retain_graph=True)
    assert not second.requires_grad
    (second,) = torch.autograd.grad(dx.square().sum(), inputs[3], create_graph=True)
    assert second.requires_grad


def test_backward_under_autocast_keeps_the_forward_dtype(device):
    inputs = [t.requires_grad_() for t in tensors(device, torch.float32)]
    y = ours(*inputs)[0].square().sum()
    expected = torch.autograd.grad(y, inputs, retain_graph=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = torch.autograd.grad(y, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_func_transforms(device, precise):
    """jacrev, per-sample gradients and vmap, against the same on the reference."""
    dtype, close = precise
    x, *rest = tensors(device, dtype)

    def both(transform):
        return [transform(f) for f in (ours, lstm_reference)]

    def jacobian(f):
        return torch.func.jacrev(lambda x: f(x, *rest)[0])(x)

    def second(f):
        return torch.func.jacrev(torch.func.jacrev(lambda x: f(x, *rest)[0].square().sum()))(x)

    def mapped(f):
        return torch.func.vmap(lambda x: f(x, *rest)[2])(torch.stack([x, 2 * x]))

    def per_sample(f):
        gradient = torch.func.grad(lambda w, x: f(x, *rest[:2], w, *rest[3:])[0].square().sum())
        return torch.func.vmap(gradient, in_dims=(None, 0))(rest[2], torch.stack([x, 2 * x]))

    for transform in (jacobian, second, mapped, per_sample):
        torch.testing.assert_close(*both(transform), **close)


def test_func_grad_takes_the_kernels(device, precise):
    dtype, close = precise
    inputs = tensors(device, dtype)
    got = torch.func.grad(lambda x: ours(x, *inputs[1:])[0].sin().sum())(inputs[0])
    expected = torch.func.grad(lambda x: lstm_reference(x, *inputs[1:])[0].sin().sum())(inputs[0])
    torch.testing.assert_close(got, expected, **close)


def test_hooks_may_bring_saved_tensors_back_with_other_strides(device):
    """As offloading and compression do."""
    inputs = [t.requires_grad_() for t in tensors(device, torch.float32)]
    expected = torch.autograd.grad(ours(*inputs)[0].square().sum(), inputs)

    def spread(tensor):
        twice = torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)
        return lambda: twice[..., 0]

    with torch.autograd.graph.saved_tensors_hooks(spread, lambda unpack: unpack()):
        y = ours(*inputs)[0]
    got = torch.autograd.grad(y.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.skipif(COMPILED, reason="the kernels have no float64 on a GPU")
def test_batched_gradients_can_be_differentiated_again(device):
    results = []
    for function in (ours, lstm_reference):
        inputs = [t.requires_grad_() for t in tensors(device)]
        y = function(*inputs)[0]
        cotangents = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
        (jacobian,) = torch.autograd.grad(y, inputs[0], cotangents, is_grads_batched=True, create_graph=True)
        results.append(torch.autograd.grad(jacobian.square().sum() + y.sum(), inputs))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_without_a_state_nothing_is_done_about_h0(device, monkeypatch):
    monkeypatch.setattr(
        "triton_lstm.operator.layer.first_rows", lambda *_: pytest.fail("the first step's gradients were copied")
    )
    module = triton_lstm.LSTM(3, 5, bidirectional=True, backend="triton").to(device)
    module(torch.randn(4, 2, 3, device=device))[0].sum().backward()
    assert module.weight_hh_l0.grad.any()
