"""The adapters for third-party LSTMs, against stubs that follow their documentation."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from triton_lstm.core.reference import lstm_reference, lstm_steps
from triton_lstm.perf import peers
from triton_lstm.perf.cases import Case
from triton_lstm.perf.check import Check, make_problem
from triton_lstm.perf.providers import PROVIDERS, make


def flashrnn(Wx, R, b, states=None, function="lstm", config=None, backend="cuda_fused", dtype="bfloat16"):
    """Wx (B, T, gates, heads, D), R (gates, heads, D, D before), b (gates, heads, D) -> h and c (2, B, T, heads, D)."""
    assert (function, backend) == ("lstm", "cuda_fused") and getattr(torch, dtype) == Wx.dtype
    B, T, gates, heads, D = Wx.shape
    assert gates == 4 and R.shape == (4, heads, D, D) and b.shape == (4, heads, D)
    h = c = Wx.new_zeros(B, heads, D)
    steps = []
    for t in range(T):
        i, f, g, o = (Wx[:, t, k] + torch.einsum("hdp,bhp->bhd", R[k], h) + b[k] for k in range(4))
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        steps.append(torch.stack([h, c]))
    return torch.stack(steps, 2), steps[-1]


def lstm_triton(x, hidden, cell, w_ih, w_hh, b_ih, b_hh, is_init, compute_dtype=torch.float32):
    """x (B, T, I), hidden and cell (B, T, H), is_init (B, T) -> every h and c (B, T, H), the last ones (B, H)."""
    B, T, _ = x.shape
    assert hidden.shape == cell.shape == (B, T, w_hh.shape[1])
    assert is_init.shape == (B, T) and is_init.is_contiguous() and is_init.dtype == torch.bool  # the kernel's pointer
    h, c, y = hidden[:, 0], cell[:, 0], []
    for t in range(T):
        h, c = (torch.where(is_init[:, t, None], a[:, t], b) for a, b in ((hidden, h), (cell, c)))
        [(_, c, h)] = lstm_steps([x[:, t]], h, c, w_ih, w_hh, b_ih, b_hh)
        y.append(h)
    return torch.stack(y, 1), None, h, c


class Haste(nn.Module):
    """x (T, B, I) -> y (T, B, H), state; kernels transposed and in the gate order i, g, f, o."""

    def __init__(self, input_size, hidden_size, batch_first=False):
        super().__init__()
        self.hidden_size, self.weights = hidden_size, None

    def from_native_weights(self, *weights):
        self.weights = nn.ParameterList(weights)

    def forward(self, x):
        state = x.new_zeros(x.shape[1], self.hidden_size)
        y, h, c = lstm_reference(x, state, state, *self.weights)
        return y, (h, c)


@pytest.fixture
def installed(monkeypatch):
    """Stubs for all three packages, and no GPU required."""
    names = {
        "flashrnn": {"flashrnn": flashrnn},
        "torchrl": {},
        "torchrl.modules": {},
        "torchrl.modules.tensordict_module": {},
        "torchrl.modules.tensordict_module._rnn_triton": {"lstm_triton": lstm_triton},
        "haste_pytorch": {"LSTM": Haste},
    }
    for name, content in names.items():
        module = ModuleType(name)
        module.__dict__.update(content, __spec__=object())
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "name, precision", [("FlashRNN", "bf16"), ("FlashRNN", "fp16"), ("TorchRL", "fp32"), ("haste", "fp32")]
)
def test_layouts_of_the_adapters(installed, name, precision, batch_first, device):
    case = Case(precision, T=3, B=2, I=5, H=4, batch_first=batch_first)
    problem = make_problem(case, device)
    module = make(PROVIDERS[name], case, problem.twin)
    assert isinstance(module, peers._Peer)
    row = Check(problem)(module)
    assert "status" not in row and row["error_share"] <= 1


@pytest.mark.parametrize("batch_first", [False, True])
def test_torchrl_is_given_the_resets(installed, batch_first, device):
    case = Case("fp32", T=5, B=3, I=5, H=4, batch_first=batch_first, resets=0.2)
    problem = make_problem(case, device)
    check = Check(problem)
    module = make(PROVIDERS["TorchRL"], case, problem.twin)
    assert "status" not in check(module)
    module.is_init.zero_()
    assert check(module)["status"] == "wrong"


@pytest.mark.parametrize("name", ["FlashRNN", "TorchRL", "haste"])
def test_what_an_installed_peer_cannot_do(installed, name, device):
    why_not = PROVIDERS[name].why_not
    precision = "bf16" if name == "FlashRNN" else "fp32"
    other = "fp32" if name == "FlashRNN" else "bf16"
    assert why_not(Case(other, T=3, B=2, H=4), device) == f"does not support {other}"
    assert "one layer" in why_not(Case(precision, T=3, B=2, H=4, layers=2), device)
    without = None if device.type == "cuda" else "needs a GPU"
    assert why_not(Case(precision, T=3, B=2, H=4), device) == without
    with_resets = without if name == "TorchRL" else "has no resets"
    assert why_not(Case(precision, T=3, B=2, H=4, resets=0.0), device) == with_resets
