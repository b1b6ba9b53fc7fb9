"""The module inside PyTorch's other machinery: functional_call, pickle, meta, autocast, checkpointing, tracing."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import triton_lstm


def test_weights_are_read_at_the_call(device):
    module = triton_lstm.LSTM(4, 6, backend="triton").to(device)
    x = torch.randn(5, 3, 4, device=device)
    doubled = {name: 2 * p for name, p in module.named_parameters()}
    expected = copy.deepcopy(module)
    expected.load_state_dict(doubled)
    assert torch.equal(torch.func.functional_call(module, doubled, (x,))[0], expected(x)[0])
    halves = {name: p.half() for name, p in module.named_parameters()}
    assert torch.func.functional_call(module, halves, (x.half(),))[0].dtype == torch.float16
    assert module(x)[0].dtype == torch.float32


def test_activation_checkpointing(device):
    module = triton_lstm.LSTM(4, 6, backend="triton").to(device)
    x = torch.randn(5, 3, 4, device=device, requires_grad=True)
    checkpointed = torch.utils.checkpoint.checkpoint(lambda x: module(x)[0], x, use_reentrant=False)
    got = torch.autograd.grad(checkpointed.sum(), [x, *module.parameters()])
    expected = torch.autograd.grad(module(x)[0].sum(), [x, *module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_two_threads(device):
    """The interpreter patches Triton itself during a launch, so launches take turns there."""
    module = triton_lstm.LSTM(4, 6, backend="triton").to(device)
    x = torch.randn(5, 3, 4, device=device)
    expected = module(x)[0].detach()

    def work(_):
        y = module(x)[0]
        y.sum().backward()
        return torch.equal(y.detach(), expected)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(12)))


def test_forward_mode_is_refused_not_forgotten(device):
    module = triton_lstm.LSTM(4, 6, backend="triton").to(device).requires_grad_(False)
    x = torch.randn(5, 3, 4, device=device)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        module(forward_ad.make_dual(x, x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_tracing_and_fake_tensors_take_pytorchs_path(device):
    module = triton_lstm.LSTM(4, 6).to(device)
    x = torch.randn(5, 3, 4, device=device)
    traced = torch.jit.trace(module, (x,))
    torch.testing.assert_close(traced(x)[0], module(x)[0], rtol=1e-3, atol=1e-4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert module(mode.from_tensor(x))[0].shape == (5, 3, 6)


def test_negative_views(device):
    module = triton_lstm.LSTM(4, 6, backend="triton").to(device)
    x, h = torch.randn(5, 3, 4, device=device), torch.randn(1, 3, 6, device=device)
    negative = torch._neg_view(h)
    assert torch.equal(module(x, (negative, negative))[0], module(x, (-h, -h))[0])


def test_pickle_and_deepcopy():
    module = triton_lstm.LSTM(4, 6, backend="torch")
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    x = torch.randn(5, 3, 4)
    for twin in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        assert twin.backend == "torch" and torch.equal(twin(x)[0], module(x)[0])


def test_meta_device_and_skip_init():
    assert triton_lstm.LSTM(4, 6, device="meta")(torch.randn(5, 3, 4, device="meta"))[0].shape == (5, 3, 6)
    assert nn.utils.skip_init(triton_lstm.LSTM, 4, 6).weight_hh_l0.shape == (24, 6)


def test_autocast_bf16_stays_bf16(device):
    module = triton_lstm.LSTM(4, 6, backend="triton").to(device)
    x = torch.randn(5, 3, 4, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, (h_n, c_n) = module(x)
    assert y.dtype == h_n.dtype == c_n.dtype == torch.bfloat16
    y.float().sum().backward()
    assert module.weight_hh_l0.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), module(x)[0], rtol=2e-2, atol=2e-2)
