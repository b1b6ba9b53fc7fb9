"""The repair of the interpreter's bfloat16, against torch; NumPy's warnings."""

import pytest
import torch
import triton
import triton.language as tl

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled here, not interpreted", allow_module_level=True)

import triton_lstm
import triton_lstm.kernels  # repairs the interpreter


@triton.jit
def cast_kernel(src_ptr, dst_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(dst_ptr + offs, tl.load(src_ptr + offs).to(dst_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + offs, tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs)))


def test_every_upper_half_rounds_as_torch_does():
    """All 65,536 bfloat16 values, each with low bits below, at and above the tie."""
    high = torch.arange(1 << 16, dtype=torch.int64)
    for low in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = high << 16 | low
        wide = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
        narrow = torch.empty(1 << 16, dtype=torch.bfloat16)
        cast_kernel[(1,)](wide, narrow, 1 << 16)
        expected = wide.bfloat16()
        assert torch.equal(narrow.isnan(), expected.isnan())
        finite = ~expected.isnan()
        assert torch.equal(narrow.view(torch.int16)[finite], expected.view(torch.int16)[finite])


def test_widening_is_exact():
    narrow = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    wide = torch.empty(1 << 16)
    cast_kernel[(1,)](narrow, wide, 1 << 16)
    assert torch.equal(wide.nan_to_num(nan=7.0), narrow.float().nan_to_num(nan=7.0))


def test_dot_multiplies_values():
    torch.manual_seed(0)
    a, b = torch.randn(2, 32, 32).bfloat16()
    out = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, out, 32)
    torch.testing.assert_close(out, a.float() @ b.float())


@pytest.mark.filterwarnings(
    "error",
    "ignore:LSTM with projections is not supported with oneDNN:UserWarning",
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning",  # Triton 3.6's, whatever the numbers are
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0], ids=["NaN", "infinity", "overflow"])
def test_numpy_says_nothing_of_what_is_not_finite(value, dtype):
    module = triton_lstm.LSTM(3, 4, bidirectional=True, proj_size=2, backend="triton").to(dtype)
    if value == 1.0:
        with torch.no_grad():
            for weight in module.parameters():
                weight.fill_(torch.finfo(dtype).max)
    x = torch.randn(4, 2, 3, dtype=dtype)
    x[1, 0] = value
    x.requires_grad_()
    y, (_, c_n) = module(x, (torch.full((2, 2, 2), value, dtype=dtype), torch.full((2, 2, 4), value, dtype=dtype)))
    (y.square().sum() + c_n.sum()).backward()
    assert not y.isfinite().all() or not x.grad.isfinite().all()
