"""The module inside PyTorch's other machinery: functional_call, pickle, meta, autocast, checkpointing, tracing."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence

import triton_lstm

with pytest.MonkeyPatch.context() as patch:
    patch.setattr(torch.backends, "disable_global_flags", lambda: None)  # or no test of ours could set one of cuDNN's
    from torch.testing._internal.two_tensor import TwoTensor


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
        x = mode.from_tensor(x)
        assert device.type == "cuda" or module(x)[0].shape == (
            5,
            3,
            6,
        )  # with cuDNN PyTorch's LSTM takes no fake tensors


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


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_autocast_takes_any_mix_of_dtypes(input_dtype, state_dtype, weight_dtype, packed, device):
    """Everything is computed and returned in autocast's dtype; every gradient has the dtype of its tensor."""
    torch.manual_seed(0)
    module = triton_lstm.LSTM(4, 6, proj_size=3, bidirectional=True, backend="triton").to(device, weight_dtype)
    exact = nn.LSTM(4, 6, proj_size=3, bidirectional=True).double()
    exact.load_state_dict(module.state_dict())
    x = torch.randn(5, 3, 4, device=device, dtype=input_dtype, requires_grad=True)
    hx = None
    if state_dtype is not None:
        hx = tuple(torch.randn(2, 3, n, device=device, dtype=state_dtype, requires_grad=True) for n in (3, 6))
    input = pack_padded_sequence(x, [5, 3, 2]) if packed else x
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, (h_n, c_n) = module(input, hx)
    y, input = (y.data, input.data) if packed else (y, input)
    assert y.dtype == h_n.dtype == c_n.dtype == torch.bfloat16
    (y.float().sum() + c_n.float().sum()).backward()
    assert x.grad.dtype == input_dtype and module.weight_hr_l0.grad.dtype == weight_dtype
    assert hx is None or [state.grad.dtype for state in hx] == [state_dtype] * 2
    wide = pack_padded_sequence(x.detach().cpu().double(), [5, 3, 2]) if packed else x.detach().cpu().double()
    right, states = exact(wide, None if hx is None else tuple(state.detach().cpu().double() for state in hx))
    torch.testing.assert_close(y.cpu().double(), right.data if packed else right, rtol=5e-2, atol=3e-2)
    torch.testing.assert_close(c_n.cpu().double(), states[1], rtol=5e-2, atol=3e-2)


def test_what_no_kernel_can_read_goes_to_pytorch(device):
    """A tensor subclass among the states, real tensors under a FakeTensorMode, a trace by make_fx."""
    module, x = triton_lstm.LSTM(4, 6).to(device), torch.randn(5, 3, 4, device=device)
    h = torch.randn(1, 3, 6, device=device)
    assert isinstance(module(x, (TwoTensor(h, h), TwoTensor(h, h)))[0], TwoTensor)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert device.type == "cuda" or module(x)[0].shape == (5, 3, 6)
    if device.type == "cuda":
        return  # PyTorch's own LSTM cannot be traced so with cuDNN
    traced = make_fx(lambda x: module(x)[0])(x)
    torch.testing.assert_close(traced(2 * x), module(2 * x)[0], rtol=1e-3, atol=1e-3)
