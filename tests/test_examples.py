"""The examples run, and the features that they use are correct."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import triton_lstm

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_wgan_gp_runs():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "wgan_gp.py", "--steps", "2"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2"]
    for line in lines:
        loss, penalty = map(float, re.findall(r"critic loss (\S+), penalty (\S+)", line)[0])
        assert 0 < penalty < 2 and abs(loss) < 20


@pytest.mark.parametrize("kwargs", [{}, dict(num_layers=2, bidirectional=True)], ids=str)
def test_the_weight_gradients_of_a_gradient_penalty_are_those_of_nn_lstm(kwargs, device):
    """In float64 where the kernels have it; nn.LSTM on the CPU, since cuDNN's has no double backward."""
    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    twin = nn.LSTM(3, 4, **kwargs).double()
    module = triton_lstm.LSTM(3, 4, **kwargs, backend="triton")
    module.load_state_dict(twin.state_dict())
    module.to(device, torch.float32 if on_gpu else torch.float64)
    data = torch.randn(5, 2, 3, dtype=torch.float64)

    def gradients(module):
        x = data.to(module.weight_hh_l0).requires_grad_()
        out = module(x)[0]
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (out.pow(2).sum() + 10 * g.pow(2).sum()).backward()
        return {"x": x.grad} | {name: parameter.grad for name, parameter in module.named_parameters()}

    got, expected = gradients(module), gradients(twin)
    tolerance = dict(rtol=2e-2, atol=2e-3) if on_gpu else dict(rtol=1e-9, atol=1e-12)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name].cpu().double(), tensor, **tolerance, msg=name)
