"""Gradients of a layer that plain PyTorch computes, batched ones and those of gradients, against PyTorch's own LSTM."""

import copy

import pytest
import torch
from compiled import COMPILED
from torch.nn.utils.rnn import pack_padded_sequence

import triton_lstm

pytestmark = pytest.mark.skipif(COMPILED, reason="the kernels have no float64 on a GPU")
CLOSE = dict(rtol=1e-10, atol=1e-12)
RESETS = torch.tensor([[False, False], [False, True], [True, False]])
FORMS = {
    "dense": lambda module, x, hx: module(x, hx)[0],
    "states": lambda module, x, hx: torch.cat([t.flatten() for t in module(x, hx)[1]]),
    "resets": lambda module, x, hx: module(x, hx, resets=RESETS.to(x.device))[0],
    "packed": lambda module, x, hx: module(pack_padded_sequence(x, [3, 2]), hx)[0].data,
}


def pair(device, **kwargs):
    """Ours and the same by PyTorch, in float64, and an input."""
    torch.manual_seed(0)
    ours = triton_lstm.LSTM(2, 3, **kwargs, backend="triton").to(device, torch.float64)
    twin = copy.deepcopy(ours)
    twin.backend = "torch"
    return ours, twin, torch.randn(3, 2, 2, dtype=torch.float64).to(device)


def inputs_of(module, x):
    """x, h0 and c0, which the module's results depend on as on its parameters."""
    hx = torch.linspace(-1, 1, 2 * (1 + module.bidirectional) * 6).to(x).view(2, -1, 2, 3)
    return [t.clone().requires_grad_() for t in (x, *hx)]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("form", list(FORMS))
def test_batched_gradients_are_those_of_each_cotangent(form, both, device):
    ours, twin, x = pair(device, bidirectional=both)
    results = []
    for module in (ours, twin):
        given = inputs_of(module, x)
        inputs = [*given, *module.parameters()]
        y = FORMS[form](module, given[0], given[1:])
        cotangents = torch.eye(y.numel(), dtype=y.dtype, device=device).view(-1, *y.shape)
        if module is ours:
            results.append(torch.autograd.grad(y, inputs, cotangents, is_grads_batched=True))
            assert not any(grad.requires_grad for grad in results[0])
        else:
            each = [torch.autograd.grad(y, inputs, cotangent, retain_graph=True) for cotangent in cotangents]
            results.append([torch.stack(grads) for grads in zip(*each, strict=True)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("form", list(FORMS))
def test_double_backward(form, both, device):
    results = []
    *modules, x = pair(device, bidirectional=both)
    for module in modules:
        given = inputs_of(module, x)
        inputs = [*given, *module.parameters()]
        loss = FORMS[form](module, given[0], given[1:]).square().sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


def test_of_frozen_tensors_there_are_none(device):
    ours, twin, x = pair(device)
    y, cotangents = [], torch.randn(4, 3, 2, 3, dtype=x.dtype).to(device)
    for module in (ours, twin):
        module.weight_ih_l0.requires_grad_(False)
        module.bias_hh_l0.requires_grad_(False)
        y.append(module(x)[0])
    got = torch.autograd.grad(y[0], [ours.weight_hh_l0, ours.bias_ih_l0], cotangents, is_grads_batched=True)
    for k, cotangent in enumerate(cotangents):
        expected = torch.autograd.grad(y[1], [twin.weight_hh_l0, twin.bias_ih_l0], cotangent, retain_graph=True)
        torch.testing.assert_close([grad[k] for grad in got], list(expected), **CLOSE)


def test_batched_gradients_of_a_gate_that_depends_on_nothing_but_the_input(device):
    """Of one step: c0 comes after the gates."""
    ours, _, x = pair(device)
    h0, c0 = (torch.zeros(1, 2, 3, dtype=x.dtype, device=device, requires_grad=True) for _ in range(2))
    states = ours(x[:1], (h0, c0), return_states=True)[2][0]
    cotangents = torch.ones(2, *states.i.shape, dtype=x.dtype, device=device)
    dh0, dc0 = torch.autograd.grad(states.i, [h0, c0], cotangents, is_grads_batched=True, allow_unused=True)
    assert dh0.any() and (dc0 is None or not dc0.any())


def test_batched_gradients_in_16_bits_are_rounded_once(device):
    ours, twin, x = pair(device)
    ours, twin, x = ours.to(torch.bfloat16), twin.to(torch.bfloat16).float(), x.to(torch.bfloat16)
    cotangents = torch.randn(4, 3, 2, 3).to(device, torch.bfloat16)
    results = []
    for module in (ours, twin):
        like = next(module.parameters())
        inputs = [x.to(like).requires_grad_(), *module.parameters()]
        y = module(inputs[0])[0]
        if module is ours:
            results.append(torch.autograd.grad(y, inputs, cotangents, is_grads_batched=True))
        else:
            each = [torch.autograd.grad(y, inputs, cotangent.to(y), retain_graph=True) for cotangent in cotangents]
            results.append([torch.stack(grads) for grads in zip(*each, strict=True)])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), expected, rtol=2**-8, atol=1e-6)


def test_double_backward_in_16_bits_adds_up_in_float32(device, monkeypatch):
    import triton_lstm.operator.autograd as autograd

    seen, shipped = [], autograd.loop_by_torch
    monkeypatch.setattr(
        autograd, "loop_by_torch", lambda xg, *rest: seen.append((xg.dtype, rest[2].dtype)) or shipped(xg, *rest)
    )
    ours, _, x = pair(device)
    ours, x = ours.to(torch.bfloat16), x.to(torch.bfloat16).requires_grad_()
    (dx,) = torch.autograd.grad(ours(x)[0].square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    assert seen and set(seen) == {(torch.float32, torch.float32)}
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in ours.parameters())
