"""What a call costs the host, counted and not timed: Python and C functions called, operators of PyTorch run.

Short sequences are bound by this. One layer, T=4, B=2, no hx; the launches themselves are left out.
"""

import sys
from collections import Counter

import pytest
import torch

import triton_lstm

T, B, INPUTS, UNITS = 4, 2, 8, 16


@pytest.fixture
def calls(interpreter, monkeypatch):
    """inference, forward (of training) and step (with its backward pass), each a function."""
    monkeypatch.setattr("triton_lstm.kernels.launch._launch_steps", lambda *_: None)
    module = triton_lstm.LSTM(INPUTS, UNITS, backend="triton")
    parameters = list(module.parameters())
    x, dy = torch.randn(T, B, INPUTS), torch.randn(T, B, UNITS)

    def inference():
        with torch.no_grad():
            module(x)

    def step():
        for parameter in parameters:
            parameter.grad = None
        module(x)[0].backward(dy)

    found = {"inference": inference, "forward": lambda: module(x), "step": step}
    for call in found.values():
        call()  # the first one plans and caches
    return found


def functions(call):
    """How many functions `call` calls, of Python and of C; a backward pass on the CPU runs in this thread."""
    count = Counter()

    def profile(frame, event, argument):
        count[event] += 1

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count["call"] + count["c_call"]


def operators(call):
    """How many operators `call` runs, those inside others included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    return sum(event.name.startswith("aten::") for event in profiler.events())


@pytest.mark.parametrize("name, most", [("inference", 140), ("forward", 175), ("step", 350)])
def test_functions_called(calls, name, most):
    assert functions(calls[name]) <= most


@pytest.mark.parametrize("name, most", [("inference", 24), ("forward", 26), ("step", 80)])
def test_operators_run(calls, name, most):
    assert operators(calls[name]) <= most


def test_no_value_derived_from_weights_is_kept(device):
    """A change through .data leaves no trace in a version counter."""
    module = triton_lstm.LSTM(INPUTS, UNITS).to(device)
    x = torch.randn(T, B, INPUTS, device=device)
    before = module(x)[0]
    module.bias_ih_l0.data.fill_(1)
    assert not torch.equal(module(x)[0], before)
