"""The gates' functions, exact ones and those for 16 bits."""

import pytest
import torch
import triton
import triton.language as tl

from triton_lstm.kernels import cell

if torch.cuda.is_available():
    pytest.skip("runs in the interpreter", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("interpreter")
VALUES = [0.0, 1e-7, 3e-4, 0.2, 1.0, 4.0, 30.0, 300.0, float("inf")]


@triton.jit
def gates_kernel(x_ptr, sigmoid_ptr, tanh_ptr, N: tl.constexpr, EXACT: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs, mask=offs < N)
    tl.store(sigmoid_ptr + offs, cell.sigmoid(x, EXACT), mask=offs < N)
    tl.store(tanh_ptr + offs, cell.tanh(x, EXACT), mask=offs < N)


@pytest.mark.parametrize("exact, rtol, atol", [(True, 1e-6, 0.0), (False, 5e-4, 1e-7)])
def test_gates(exact, rtol, atol):
    """The latter are as good as float16 shows, and both odd, 0 at 0, and right at infinity; a NaN passes."""
    x = torch.tensor([*VALUES, *(-v for v in VALUES), float("nan")] + [0.0] * 13)
    sigmoid, tanh = torch.empty_like(x), torch.empty_like(x)
    gates_kernel[(1,)](x, sigmoid, tanh, 32, exact)
    torch.testing.assert_close(sigmoid, x.sigmoid(), rtol=rtol, atol=max(atol, 1e-38), equal_nan=True)
    torch.testing.assert_close(tanh, x.tanh(), rtol=rtol, atol=atol, equal_nan=True)
    count = len(VALUES)
    assert torch.equal(tanh[:count], -tanh[count : 2 * count]) and tanh[0] == 0
    assert tanh[count - 1] == 1 and sigmoid[2 * count - 1] == 0
