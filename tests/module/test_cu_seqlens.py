"""cu_seqlens=: documents of one stream, side by side where they are known on the CPU, else as resets."""

import pytest
import torch
from oracle import run, state_shapes
from segments_alone import alone
from torch import nn

import triton_lstm
from triton_lstm.core.segments import resets_at

CUTS = {"several": [0, 3, 4, 9, 12], "one": [0, 12], "empty ones": [0, 0, 5, 5, 12, 12], "tokens": [*range(13)]}
KWARGS = [{}, dict(num_layers=2, bidirectional=True), dict(proj_size=2, bidirectional=True), dict(batch_first=True)]
T = 12


def resets_of(cuts, device="cpu"):
    """(T, 1), of documents without a first one."""
    resets = torch.zeros(T, 1, dtype=torch.bool, device=device)
    resets[[cut for cut in cuts if 0 < cut < T]] = True
    return resets


def pair(device, dtype, backend, **kwargs):
    torch.manual_seed(0)
    twin = nn.LSTM(3, 6, **kwargs).double()
    module = triton_lstm.LSTM(3, 6, **kwargs, backend=backend).to(device, dtype)
    module.load_state_dict(twin.state_dict())
    x = torch.randn(*((1, T) if kwargs.get("batch_first") else (T, 1)), 3, dtype=torch.float64)
    return module, twin, x, tuple(torch.randn(shape, dtype=torch.float64) for shape in state_shapes(module, 1))


@pytest.mark.parametrize("kwargs", KWARGS, ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("cuts", list(CUTS))
@pytest.mark.parametrize("form", ["list", "int32", "int64", "there", "unbatched"])
def test_like_every_document_alone(form, cuts, backend, kwargs, device, precise):
    dtype, close = precise
    cuts = CUTS[cuts]
    module, twin, x, hx = pair(device, dtype, backend, **kwargs)
    cu_seqlens = cuts if form == "list" else torch.tensor(cuts, dtype=torch.int64 if form == "int64" else torch.int32)
    cu_seqlens = cu_seqlens.to(device) if form == "there" else cu_seqlens
    resets = resets_of(cuts)
    resets = resets.t() if module.batch_first else resets
    if form == "unbatched":
        x, resets, hx = x.view(T, 3), resets.view(T), tuple(state[:, 0] for state in hx)
    expected = run(twin, x, hx, call=lambda m, x, hx: alone(m, x, hx, resets))
    there = [t.to(device, dtype) for t in (x, *hx)]
    got = run(module, there[0], there[1:], call=lambda m, x, hx: m(x, hx, cu_seqlens=cu_seqlens))
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name].cpu().double(), tensor, **close, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_states_of_documents(backend, device, precise):
    dtype, close = precise
    module, _, x, hx = pair(device, dtype, backend, num_layers=2, bidirectional=True, batch_first=True)
    x, *hx = (t.to(device, dtype) for t in (x, *hx))
    resets = resets_of(CUTS["several"], device).t()
    got, expected = (
        module(x, hx, return_states=True, **segments)
        for segments in (dict(cu_seqlens=CUTS["several"]), dict(resets=resets))
    )
    torch.testing.assert_close(got, expected, **close)


def test_on_the_cpu_documents_run_side_by_side_and_elsewhere_one_after_the_other(device, monkeypatch):
    import triton_lstm.operator.layer as layer

    seen, shipped = [], layer.lstm_forward
    monkeypatch.setattr(layer, "lstm_forward", lambda *args, **kwargs: seen.append(kwargs) or shipped(*args, **kwargs))
    module, x = triton_lstm.LSTM(3, 6, backend="triton").to(device), torch.randn(T, 1, 3, device=device)
    with torch.no_grad():
        side_by_side = module(x, cu_seqlens=CUTS["several"])
        with monkeypatch.context() as patched:
            patched.setattr("triton_lstm.module.has_no_values", lambda input: True)
            torch.testing.assert_close(module(x, cu_seqlens=CUTS["several"]), side_by_side, rtol=1e-4, atol=1e-4)
        module(x, cu_seqlens=CUTS["one"])
    packed, resets, plain = seen
    assert packed["lengths"].tolist() == [5, 3, 3, 1] and packed["resets"] is None
    assert resets["lengths"] is None and torch.equal(resets["resets"].cpu(), resets_of(CUTS["several"]))
    assert plain["lengths"] is None and plain["resets"] is None


def test_resets_at():
    for cuts in CUTS.values():
        assert torch.equal(resets_at(torch.tensor(cuts, dtype=torch.int32), T), resets_of(cuts).view(T))
    for wrong in ([3, -5, 900], [900, 0], [-1, -1]):  # no access outside of a tensor
        assert resets_at(torch.tensor(wrong), T).shape == (T,)


REFUSED = [
    (dict(cu_seqlens=[0, 5]), ValueError, r"from 0 to the input's 12 steps and never back, got \[0, 5\]"),
    (dict(cu_seqlens=[1, 12]), ValueError, "never back"),
    (dict(cu_seqlens=[0, 8, 4, 12]), ValueError, "never back"),
    (dict(cu_seqlens=[*range(8), *range(13)]), ValueError, r"got \[0, 1, 2, 3, '...', 9, 10, 11, 12\]"),
    (dict(cu_seqlens=[0.0, 12.0]), ValueError, "1-D tensor of int32 or int64.*got torch.float32"),
    (dict(cu_seqlens=[12]), ValueError, r"got torch.int64 \(1,\)"),
    (dict(cu_seqlens=[]), ValueError, r"got torch.int32 \(0,\)"),
    (dict(cu_seqlens=torch.zeros(2, 2, dtype=torch.int32)), ValueError, r"got torch.int32 \(2, 2\)"),
    (dict(cu_seqlens="0, 12"), TypeError, "got str"),
    (dict(cu_seqlens=12), TypeError, "got int"),
    (dict(cu_seqlens=[0, 12], resets=torch.zeros(T, 1, dtype=torch.bool)), ValueError, "not with resets"),
]


@pytest.mark.parametrize("arguments, error, says", REFUSED)
def test_what_does_not_fit_is_refused(arguments, error, says, device):
    arguments = {name: t.to(device) if name == "resets" else t for name, t in arguments.items()}
    module, x = triton_lstm.LSTM(3, 4).to(device), torch.randn(T, 1, 3, device=device)
    with pytest.raises(error, match=says):
        module(x, **arguments)
    with pytest.raises(error, match=says):
        triton_lstm.lstm(x, None, list(module.parameters()), **arguments)


def test_what_is_recorded_is_checked_as_well(device):
    module, x = triton_lstm.LSTM(3, 4).to(device), torch.randn(T, 1, 3, device=device)
    with triton_lstm.record_gradients(module), pytest.raises(ValueError, match="never back"):
        module(x, cu_seqlens=[2, 4, 99])


@pytest.mark.parametrize("segments", [dict(cu_seqlens=[0, 2, T]), dict(cu_seqlens=[0, 6, T])], ids=str)
def test_the_dtype_under_autocast_does_not_depend_on_where_documents_end(segments, device):
    """PyTorch's autocast on the CPU leaves packed rows in float32."""
    module, x = triton_lstm.LSTM(3, 4, backend="torch").to(device), torch.randn(T, 1, 3, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert module(x, **segments)[0].dtype == module(x)[0].dtype


def test_other_batches_are_refused(device):
    module, x = triton_lstm.LSTM(3, 4).to(device), torch.randn(T, 2, 3, device=device)
    with pytest.raises(ValueError, match="got a batch of 2"):
        module(x, cu_seqlens=[0, T])
    with pytest.raises(ValueError, match="not with packed rows or lengths"):
        module(x, cu_seqlens=[0, T], lengths=[T, 3])
    packed = nn.utils.rnn.pack_sequence([torch.randn(T, 3, device=device)])
    with pytest.raises(ValueError, match="not with packed rows or lengths"):
        module(packed, cu_seqlens=[0, T])
    params = list(module.parameters())
    with pytest.raises(ValueError, match="not with packed rows"):
        triton_lstm.lstm(packed.data, None, params, batch_sizes=packed.batch_sizes, cu_seqlens=[0, T])


def test_numbers_of_numpy_are_taken(device):
    numpy = pytest.importorskip("numpy")
    module, x = triton_lstm.LSTM(3, 4).to(device), torch.randn(T, 1, 3, device=device)
    cuts = CUTS["several"]
    torch.testing.assert_close(module(x, cu_seqlens=numpy.array(cuts, numpy.int32)), module(x, cu_seqlens=cuts))
