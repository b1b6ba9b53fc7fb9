"""A projection whose folded weight, W_hh @ W_hr, is larger than float16 can hold: as nn.LSTM, which does not fold."""

import pytest
import torch
from oracle import assert_like_nn_lstm, data_of, flat, state_shapes
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import triton_lstm

T, B, FEATURES, H, P = 5, 3, 4, 6, 2
LENGTHS = [2, 5, 3]
HALF = torch.float16


def module_of(device, **kwargs):
    torch.manual_seed(0)
    return triton_lstm.LSTM(FEATURES, H, proj_size=P, **kwargs).to(device)


def input_of(layout, device, dtype=HALF):
    x = torch.randn(T, B, FEATURES, device=device).to(dtype)
    return pack_padded_sequence(x, LENGTHS, enforce_sorted=False) if layout == "packed" else x


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_folded_weight_beyond_float16(layout, recompute, device):
    """Its unit's output gate is shut, so the rest is an ordinary layer: infinity times 0 would not be."""
    kwargs = dict(num_layers=2, bidirectional=True)
    module = module_of(device, **kwargs, recompute=recompute, backend="triton").to(HALF)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.startswith("weight_hh"):
                weight[0, 0] = 10
            if name.startswith("weight_hr"):
                weight[0, -1] = 8000
            if name.startswith("bias_ih"):
                weight[-1] = -1000

    def draw():
        return input_of(layout, device), tuple(
            torch.randn(shape, device=device, dtype=HALF) for shape in state_shapes(module, B)
        )

    assert_like_nn_lstm(module, draw, proj_size=P, **kwargs)


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend, states", [("triton", False), ("triton", True), ("torch", True)])
def test_large_weights(layout, autocast, backend, states, device):
    module = module_of(device, bidirectional=True, backend=backend)
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(1e4 / weight.norm())
    rounded = module_of(device, bidirectional=True).to(HALF)
    rounded.load_state_dict(module.state_dict())
    exact = nn.LSTM(FEATURES, H, proj_size=P, bidirectional=True).to(device, torch.float64)
    exact.load_state_dict(rounded.state_dict())
    module = module if autocast else rounded
    module.backend = backend
    x = input_of(layout, device)
    wide = x.to(torch.float64)
    with torch.autocast(device.type, HALF, enabled=autocast):
        y, h_c, *layers = module(x.to(torch.float32) if autocast else x, return_states=states)
    found, right = flat((data_of(y), h_c)), exact(wide)
    assert {t.dtype for t in found} == {HALF}
    assert_close([t.double() for t in found], flat((data_of(right[0]), right[1])), rtol=2**-9, atol=2**-9)
    for state in layers[0][0] if states else ():
        assert data_of(state).dtype == HALF and data_of(state).isfinite().all()
    sum(t.float().sum() for t in found).mul(1e-3).backward()
    sum(t.sum() for t in flat((data_of(right[0]), right[1]))).mul(1e-3).backward()
    for (name, ours), theirs in zip(module.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad.isfinite().all(), name
        assert_close(
            ours.grad.double(), theirs.grad, rtol=2**-8, atol=2**-8, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype, proj_size, expected", [(HALF, P, True), (HALF, 0, False), (torch.bfloat16, P, False)])
def test_explain_says_what_a_layer_computes_in(dtype, proj_size, expected, capsys):
    module = triton_lstm.LSTM(FEATURES, H, proj_size=proj_size).to(dtype)
    triton_lstm.explain(module, torch.zeros(T, B, FEATURES, dtype=dtype), gpu="H100")
    printed = capsys.readouterr().out
    assert ("compute in float32" in printed) == expected
    assert ("forward (tf32)" in printed or "forward (fp32)" in printed) == expected
