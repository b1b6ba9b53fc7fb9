"""PyTorch's own LSTM inside a compiled graph: where no kernel can run, and where it is asked for."""

import subprocess
import sys
from os import environ

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import triton_lstm
import triton_lstm.operator.torch_library  # the operators

CASES = {
    "plain": {},
    "all": dict(num_layers=2, bidirectional=True, proj_size=2, batch_first=True, bias=False),
    "dropout": dict(num_layers=3, dropout=0.5, batch_first=True),
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results(module, x, *hx):
    leaves = [t.detach().clone().requires_grad_() for t in (x, *hx)]
    module.zero_grad()
    torch.manual_seed(2)
    y, (h_n, c_n) = module(leaves[0], tuple(leaves[1:]) or None)
    (y.square().sum() + h_n.sin().sum() + c_n.cos().sum()).backward()
    return [t.detach() for t in (y, h_n, c_n)], [t.grad for t in leaves], [p.grad for p in module.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", CASES)
def test_pytorchs_path_in_one_graph(case, backend, dtype):
    """On the CPU: the random numbers are the same there. Traced, torch.lstm fails in float32 and unrolls otherwise."""
    kwargs = CASES[case]
    torch.manual_seed(0)
    module = triton_lstm.LSTM(7, 6, **kwargs, backend="torch").to(dtype)
    oracle = nn.LSTM(7, 6, **kwargs).to(dtype)
    oracle.load_state_dict(module.state_dict())
    module.compile(backend=backend, fullgraph=True)
    groups = module.num_layers * (2 if module.bidirectional else 1)
    for with_hx in (False, True):
        states = [torch.randn(groups, 2, module.proj_size or 6), torch.randn(groups, 2, 6)] if with_hx else []
        inputs = [t.to(dtype) for t in (torch.randn((2, 5, 7) if module.batch_first else (5, 2, 7)), *states)]
        torch.testing.assert_close(results(module, *inputs), results(oracle, *inputs))


def test_pytorchs_path_takes_any_number_of_steps(device):
    counter = CompileCounter()
    module = triton_lstm.LSTM(7, 6, backend="torch").to(device)
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for steps, batch in [(3, 2), (5, 2), (8, 4)]:
        assert compiled(torch.randn(steps, batch, 7, device=device))[0].shape == (steps, batch, 6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kwargs", [{}, dict(bidirectional=True, bias=False), dict(bidirectional=True, proj_size=2)])
@pytest.mark.parametrize("resets", [None, torch.tensor([[True, False], [False, False], [True, True]])], ids=str)
def test_operators_of_pytorchs_path(resets, kwargs):
    module = nn.LSTM(7, 6, **kwargs)
    directions = 1 + module.bidirectional
    x = torch.randn(3, 2, 7, requires_grad=True)
    states = [torch.randn(directions, 2, n, requires_grad=True) for n in (module.proj_size or 6, 6)]
    arguments = (x, *states, list(module.parameters()), module.bias, module.bidirectional, resets)
    torch.library.opcheck(torch.ops.triton_lstm.torch_layer.default, arguments)
    outputs = torch.ops.triton_lstm.torch_layer(*arguments)
    detached = torch.utils._pytree.tree_map_only(torch.Tensor, torch.detach, ([*outputs], *arguments))
    backward = torch.ops.triton_lstm.torch_layer_backward
    real = [(t.shape, t.stride(), t.dtype) for t in backward(*detached)]
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, detached)
        assert [(t.shape, t.stride(), t.dtype) for t in backward(*fake)] == real


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels need no interpreter there")
def test_without_the_interpreter_a_compiled_model_is_nn_lstm():
    code = """
import torch, triton_lstm
ours, theirs = triton_lstm.LSTM(7, 6), torch.nn.LSTM(7, 6)
theirs.load_state_dict(ours.state_dict())
compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
x = torch.randn(5, 2, 7)
compiled(x)[0].sum().backward()
theirs(x)[0].sum().backward()
torch.testing.assert_close(compiled(x), theirs(x))
torch.testing.assert_close(ours.weight_hh_l0.grad, theirs.weight_hh_l0.grad)
ours.backend = "triton"
for fullgraph in (False, True):
    try:
        torch.compile(ours, backend="eager", fullgraph=fullgraph)(x)
    except RuntimeError as error:
        assert 'backend="triton" cannot run this call: the input is on the CPU' in str(error), error
    else:
        raise SystemExit("no error")
"""
    variables = {name: value for name, value in environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
