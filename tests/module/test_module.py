"""The module as a replacement of nn.LSTM: arguments, states, weights, backends, errors."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import triton_lstm

CONSTRUCTIONS = [
    dict(),
    dict(num_layers=2, bidirectional=True),
    dict(bias=False, batch_first=True),
    dict(proj_size=3, num_layers=2, dropout=0.5),
]


@pytest.mark.parametrize("kwargs", CONSTRUCTIONS, ids=str)
def test_same_seed_same_weights_and_state_dict_both_ways(kwargs):
    torch.manual_seed(3)
    theirs = nn.LSTM(4, 6, **kwargs)
    torch.manual_seed(3)
    ours = triton_lstm.LSTM(4, 6, **kwargs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(nn.LSTM(4, 6, **kwargs).state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.weight_hh_l0, theirs.weight_hh_l0)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
def test_unbatched(batch_first, with_hx, device):
    module = triton_lstm.LSTM(4, 6, 2, batch_first=batch_first, bidirectional=True, backend="triton").to(device)
    twin = nn.LSTM(4, 6, 2, batch_first=batch_first, bidirectional=True).to(device)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(5, 4, device=device)
    hx = (torch.randn(4, 6, device=device), torch.randn(4, 6, device=device)) if with_hx else None
    for a, b in zip(flat(module(x, hx)), flat(twin(x, hx)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 if device.type == "cuda" else 1e-6)


def flat(result):
    return result[0], *result[1]


def test_strides_are_free(device):
    module = triton_lstm.LSTM(4, 6, batch_first=True, backend="triton").to(device)
    x = torch.randn(4, 3, 5, device=device).permute(1, 2, 0)  # (B, T, I), no stride as usual
    hx = (torch.randn(1, 1, 6, device=device).expand(1, 3, 6), torch.randn(6, 3, 1, device=device).permute(2, 1, 0))
    x.requires_grad_()
    got = module(x, hx)
    expected = module(x.contiguous(), tuple(t.contiguous() for t in hx))
    assert all(torch.equal(a, b) for a, b in zip(flat(got), flat(expected), strict=True))
    assert got[0].shape == (3, 5, 6) and got[0].transpose(0, 1).is_contiguous()
    got[0].sum().backward()


def test_dropout_is_functional_dropout(device):
    """Seeded by torch.manual_seed, between the layers only, in training only."""
    module = triton_lstm.LSTM(4, 6, 2, dropout=0.5, backend="triton").to(device)
    x = torch.randn(5, 3, 4, device=device)
    torch.manual_seed(7)
    got = module(x)[0]
    layers = [triton_lstm.LSTM(4, 6, backend="triton").to(device), triton_lstm.LSTM(6, 6, backend="triton").to(device)]
    for k, layer in enumerate(layers):
        layer.load_state_dict(
            {n.replace(f"l{k}", "l0"): p for n, p in module.state_dict().items() if n.endswith(f"l{k}")}
        )
    torch.manual_seed(7)
    expected = layers[1](nn.functional.dropout(layers[0](x)[0], 0.5, True))[0]
    assert torch.equal(got, expected)
    module.eval()
    assert torch.equal(module(x)[0], layers[1](layers[0](x)[0])[0])


def test_backends_agree_and_are_chosen(device, monkeypatch):
    module = triton_lstm.LSTM(4, 6, backend="torch").to(device)
    x = torch.randn(5, 3, 4, device=device)
    calls = []
    monkeypatch.setattr("triton_lstm.stack.torch.lstm", lambda *args: calls.append(args) or _lstm(*args))
    theirs = module(x)[0]
    assert len(calls) == 1
    module.backend = "triton"
    torch.testing.assert_close(module(x)[0], theirs, rtol=1e-2, atol=1e-3)
    module.backend = None
    monkeypatch.setenv("TRITON_LSTM_BACKEND", "torch")
    module(x)
    monkeypatch.setenv("TRITON_LSTM_BACKEND", "triton")
    module(x)
    assert len(calls) == 2


_lstm = torch.lstm


def test_a_bad_backend_is_named(device, monkeypatch):
    module = triton_lstm.LSTM(4, 6)
    monkeypatch.setenv("TRITON_LSTM_BACKEND", "cuda")
    with pytest.raises(ValueError, match='TRITON_LSTM_BACKEND must be "auto", "triton" or "torch", got \'cuda\''):
        module(torch.randn(5, 3, 4))
    options = dict(device=device, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=r"no kernel for torch\.complex64"):
        triton_lstm.LSTM(4, 6, backend="triton", **options)(torch.randn(5, 3, 4, **options))


H, C = torch.zeros(1, 3, 6), torch.zeros(1, 3, 6)
BAD_CALLS = {
    "1-D": (ValueError, "LSTM: Expected input to be 2D or 3D, got 1D instead", lambda m: m(torch.zeros(4))),
    "features": (RuntimeError, "must be equal to input_size. Expected 4, got 5", lambda m: m(torch.zeros(5, 3, 5))),
    "dtype": (ValueError, "does not match weight dtype", lambda m: m(torch.zeros(5, 3, 4).double())),
    "T=0": (RuntimeError, "Expected sequence length to be larger than 0 in RNN", lambda m: m(torch.zeros(0, 3, 4))),
    "h0 batch": (
        RuntimeError,
        r"Expected hidden\[0\] size \(1, 2, 6\), got \[1, 3, 6\]",
        lambda m: m(torch.zeros(5, 2, 4), (H, C)),
    ),
    "c0 size": (
        RuntimeError,
        r"Expected hidden\[1\] size \(1, 3, 6\)",
        lambda m: m(torch.zeros(5, 3, 4), (H, C[..., :5])),
    ),
    "2-D hx": (RuntimeError, "should also be 3-D but got", lambda m: m(torch.zeros(5, 3, 4), (H[0], C[0]))),
    "3-D hx": (RuntimeError, "should also be 2-D but got", lambda m: m(torch.zeros(5, 4), (H, C))),
    "hx dtype": (ValueError, "hx.1. has dtype", lambda m: m(torch.zeros(5, 3, 4), (H, C.double()))),
    "three states": (RuntimeError, "lstm expects two hidden states", lambda m: m(torch.zeros(5, 3, 4), (H, C, C))),
    "hx device": (RuntimeError, "not at the same device", lambda m: m(torch.zeros(5, 3, 4), (H, C.to("meta")))),
}


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_errors(case, backend):
    kind, text, call = BAD_CALLS[case]
    with pytest.raises(kind, match=text):
        call(triton_lstm.LSTM(4, 6, backend=backend))


def test_functional_checks_its_weights():
    weights = list(triton_lstm.LSTM(4, 6).parameters())
    x = torch.zeros(5, 3, 4)
    with pytest.raises(ValueError, match="params must contain 8 tensors, or 10 with a projection"):
        triton_lstm.lstm(x, None, weights, num_layers=2)
    with pytest.raises(ValueError, match=r"weight_hh of layer 0 must be \(24, 6\), got \(24, 5\)"):
        triton_lstm.lstm(x, None, [weights[0], weights[1][:, :5], *weights[2:]])
    with pytest.raises(RuntimeError, match="input must have 3 dimensions, got 2"):
        triton_lstm.lstm(x[0], None, weights)
    with pytest.raises(TypeError, match="params must contain tensors only"):
        triton_lstm.lstm(x, None, [*weights[:3], None])
    with pytest.raises(ValueError, match="num_layers must be greater than zero"):
        triton_lstm.lstm(x, None, weights, num_layers=0)
    with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
        triton_lstm.lstm(x, (H,), weights)
    with pytest.raises(ValueError, match="must have 2 dimensions, got 1 in weight_hh"):
        triton_lstm.lstm(x, None, [weights[0], weights[1][0], *weights[2:]])
    with pytest.raises(ValueError, match=r"input dtype \(torch.float64\) does not match weight dtype"):
        triton_lstm.lstm(x.double(), None, weights)
    with pytest.raises(RuntimeError, match="found input tensor at meta and parameter tensor at cpu"):
        triton_lstm.lstm(x.to("meta"), None, weights)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 3, 6\), got \[1, 2, 6\]"):
        triton_lstm.lstm(x, (H[:, :2], C), weights)


def test_import_and_use_without_triton():
    """A machine where triton is not installed: everything works, on PyTorch's own LSTM."""
    code = """
import sys
sys.modules["triton"] = None
import torch, triton_lstm
module = triton_lstm.LSTM(4, 6)
module(torch.randn(5, 3, 4))[0].sum().backward()
try:
    triton_lstm.LSTM(4, 6, backend="triton")(torch.randn(5, 3, 4))
except RuntimeError as error:
    assert "triton is not installed" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_does_not_load_triton():
    code = "import sys, triton_lstm; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_second_stream(device):
    module = triton_lstm.LSTM(64, 256, backend="triton").to(device)
    x = torch.randn(50, 16, 64, device=device)
    expected = module(x)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        busy = torch.randn(4096, 4096, device=device)
        for _ in range(20):
            busy = busy @ busy * 1e-4
        y = module(x + busy.sum() * 0)[0]
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, expected)


STATE = torch.zeros(1, 3, 6)
WRONG_HX = {
    "one stacked tensor": torch.stack([STATE, STATE]),
    "one tensor": STATE,
    "one state": (STATE,),
    "None in it": (STATE, None),
    "a number in it": (STATE, 1.0),
    "three": (STATE, STATE, STATE),
    "by number": {0: STATE, 1: STATE},
    "a number": 3,
}


def outcome(module, x, hx):
    """Nothing, or the error of a call."""
    try:
        module(x, hx)
    except Exception as error:
        return error


@pytest.mark.parametrize("hx", WRONG_HX.values(), ids=WRONG_HX.keys())
@pytest.mark.parametrize("packed", [False, True])
def test_a_wrong_hx_is_wrong_with_nn_lstms_error(hx, packed):
    """What nn.LSTM takes is taken, and of packed rows, which it does not check, the rest is named."""
    x = torch.zeros(5, 3, 4)
    x = pack_padded_sequence(x, torch.tensor([2, 5, 3]), enforce_sorted=False) if packed else x
    theirs, ours = (outcome(kind(4, 6), x, hx) for kind in (nn.LSTM, triton_lstm.LSTM))
    assert (theirs is None) == (ours is None) and "Boolean value" not in str(ours)
    assert packed or type(theirs) is type(ours)


@pytest.mark.parametrize("kind", [nn.LSTM, triton_lstm.LSTM])
def test_only_h0_and_c0_are_checked_for_unbatched_input(kind):
    h, c = torch.randn(2, 1, 6)
    x, module = torch.randn(5, 4), kind(4, 6)
    for hx in ((h, c, c), {0: h, 1: c}, torch.stack([h, c, c])):
        torch.testing.assert_close(module(x, hx), module(x, (h, c)), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["one stacked tensor", "one tensor", "one state", "None in it", "a number"])
def test_a_wrong_hx_of_the_functional_form(name):
    module = triton_lstm.LSTM(4, 6)
    with pytest.raises((TypeError, RuntimeError), match=r"two hidden states|tuple or list of two tensors"):
        triton_lstm.lstm(torch.zeros(5, 3, 4), WRONG_HX[name], list(module.parameters()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential], ids=["itself", "inside"])
def test_scripting_points_to_tracing_which_works(wrap, device):
    module = triton_lstm.LSTM(4, 6).to(device)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace\(model, inputs\)"):
        torch.jit.script(wrap(module))
    x = torch.randn(3, 2, 4, device=device)
    traced = torch.jit.trace(module, (x,))
    assert "aten::lstm" in str(traced.graph)
    torch.testing.assert_close(traced(x), module(x), rtol=1e-2, atol=1e-3)
    triton_lstm.convert(module, back=True)
    torch.jit.script(module)
