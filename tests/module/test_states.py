"""c and the gates of every step on request, and how little `recompute` keeps for the backward pass."""

import pytest
import torch
from oracle import assert_like_nn_lstm, data_of, state_shapes
from step_by_step import by_hand
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import triton_lstm
from triton_lstm.core.tolerance import enlarge
from triton_lstm.dispatch import Reason
from triton_lstm.functional import lstm

FEATURES, H, T, B = 3, 5, 4, 3
KINDS = [dict(), dict(bidirectional=True, num_layers=2), dict(proj_size=2, bidirectional=True), dict(bias=False)]


def flat(states):
    return [data_of(t) for layer in states for t in layer]


@pytest.mark.parametrize("kwargs", KINDS, ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("recompute", [False, True])
def test_states_and_their_gradients(kwargs, backend, recompute, device, precise):
    if recompute and backend == "triton":
        kwargs = kwargs | dict(recompute=True)
    dtype, close = precise
    torch.manual_seed(0)
    module = triton_lstm.LSTM(FEATURES, H, **kwargs, backend=backend, device=device, dtype=dtype)
    x = torch.randn(T, B, FEATURES, device=device, dtype=dtype, requires_grad=True)
    hx = tuple(torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in state_shapes(module, B))
    leaves = [x, *hx, *module.parameters()]
    got = flat(module(x, hx, return_states=True)[2])
    expected = flat(by_hand(module, x, hx))
    assert len(got) == 5 * module.num_layers
    cotangents = [torch.randn_like(t) for t in expected]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **close)
    gradients = (torch.autograd.grad(t, leaves, cotangents, allow_unused=True) for t in (got, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(torch.zeros(()).to(b) if a is None else a, b, **close)


@pytest.mark.parametrize("name", ["c", "i", "f", "g", "o"])
def test_the_gradient_of_one_state_alone(name, device, precise):
    dtype, close = precise
    torch.manual_seed(0)
    module = triton_lstm.LSTM(FEATURES, H, backend="triton", device=device, dtype=dtype)
    x = torch.randn(T, B, FEATURES, device=device, dtype=dtype, requires_grad=True)
    zeros = torch.zeros(1, B, H, device=device, dtype=dtype)
    state = getattr(module(x, return_states=True)[2][0], name)
    expected = by_hand(module, x, (zeros, zeros))[0]["cifgo".index(name)]
    cotangent = torch.randn_like(state)
    got, right = (torch.autograd.grad(t, [x, module.weight_hh_l0], cotangent) for t in (state, expected))
    assert right[1].any()
    torch.testing.assert_close(got, right, **close)


@pytest.mark.usefixtures("interpreter")  # the kernels have no float64 on a GPU
@pytest.mark.parametrize("packed", [False, True])
def test_double_backward_through_states(packed):
    torch.manual_seed(0)
    options = dict(bidirectional=True, proj_size=2, recompute=packed, backend="triton", dtype=torch.float64)
    module = triton_lstm.LSTM(2, 3, **options)
    rows = torch.randn(4 if packed else 3, *([] if packed else [2]), 2, dtype=torch.float64, requires_grad=True)

    def states(rows, w_hh):
        x = PackedSequence(rows, torch.tensor([2, 1, 1])) if packed else rows
        weights = dict(module.named_parameters()) | {"weight_hh_l0": w_hh}
        kwargs = dict(return_states=True)
        return tuple(flat(torch.func.functional_call(module, weights, (x,), kwargs)[2]))

    assert torch.autograd.gradcheck(states, (rows, module.weight_hh_l0), fast_mode=True)
    assert torch.autograd.gradgradcheck(states, (rows, module.weight_hh_l0), fast_mode=True)


def test_the_output_is_o_times_tanh_c_in_every_layout(device):
    torch.manual_seed(0)
    x = torch.randn(B, T, FEATURES, device=device)
    module = triton_lstm.LSTM(FEATURES, H, batch_first=True, bidirectional=True, backend="triton").to(device)
    packed = pack_padded_sequence(x, [2, 4, 1], batch_first=True, enforce_sorted=False)
    for input, kind in ((x, torch.Tensor), (x[0], torch.Tensor), (packed, PackedSequence)):
        output, _, [states] = module(input, return_states=True)
        assert all(isinstance(t, kind) for t in states)
        c, _, _, _, o = (data_of(t) for t in states)
        torch.testing.assert_close(data_of(output), o * c.tanh(), rtol=1e-4, atol=1e-5)
    assert states.c.unsorted_indices is packed.unsorted_indices
    padded = module(x, lengths=[2, 4, 1], return_states=True)[2][0]
    assert padded.c.shape == (B, T, 2 * H) and not padded.c[0, 2:].any() and padded.c[0, :2].all()


def test_states_are_the_same_on_both_paths_for_packed_rows(device):
    torch.manual_seed(0)
    module = triton_lstm.LSTM(FEATURES, H, 2, bidirectional=True, proj_size=2, backend="triton").to(device)
    packed = pack_padded_sequence(torch.randn(T, B, FEATURES, device=device), [4, 4, 1])
    ours = module(packed, return_states=True)
    module.backend = "torch"
    theirs = module(packed, return_states=True)
    torch.testing.assert_close(flat(ours[2]), flat(theirs[2]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours[0].data, theirs[0].data, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-4)


def test_states_in_16_bits_have_the_inputs_dtype(device):
    module = triton_lstm.LSTM(FEATURES, H, backend="triton").to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        states = module(torch.randn(T, B, FEATURES, device=device), return_states=True)[2]
    assert {t.dtype for t in flat(states)} == {torch.bfloat16}


def test_states_of_the_functional_form(device):
    module = triton_lstm.LSTM(FEATURES, H).to(device)
    x = torch.randn(T, B, FEATURES, device=device)
    with torch.no_grad():
        y, _, _, [states] = lstm(x, None, list(module.parameters()), return_states=True, backend="triton")
    torch.testing.assert_close(y, states.o * states.c.tanh(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kwargs", [*KINDS, dict(num_layers=2, batch_first=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_hx", [False, True])
def test_recompute_against_nn_lstm(kwargs, dtype, with_hx, device):
    torch.manual_seed(0)
    module = enlarge(triton_lstm.LSTM(FEATURES, 19, **kwargs, recompute=True, backend="triton")).to(device, dtype)

    def draw():
        x = torch.randn(*((B, T) if module.batch_first else (T, B)), FEATURES).to(device, dtype)
        return x, tuple(torch.randn(s).to(x) for s in state_shapes(module, B)) if with_hx else None

    assert_like_nn_lstm(module, draw, **kwargs)


def saved_bytes(module, x):
    """What a call keeps for the backward pass, less its input and the weights."""
    storages = {}
    known = {t.untyped_storage().data_ptr() for t in (data_of(x), *module.parameters())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = module(x)  # noqa: F841 (it must outlive the hooks, or its memory is counted twice)
    return sum(storages.values())


@pytest.mark.parametrize("dtype, kept, recomputed", [(torch.bfloat16, 14, 6), (torch.float32, 24, 8)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_saved_bytes_per_token(dtype, kept, recomputed, packed, bidirectional, device):
    """The table in docs/explanation/time_loop.md: y, the gates and c, per token, direction and hidden unit."""
    for recompute, each in ((False, kept), (True, recomputed)):
        options = dict(bidirectional=bidirectional, recompute=recompute, bias=False, backend="triton")
        module = triton_lstm.LSTM(FEATURES, 32, **options).to(device, dtype)

        def measured(steps, module=module):
            x = torch.randn(steps, 2, FEATURES, device=device, dtype=dtype)
            return saved_bytes(module, pack_padded_sequence(x, [steps, steps - 1]) if packed else x)

        tokens = 2 * 5  # five steps more for each of two sequences; what depends on the batch alone falls out
        growth = measured(10) - measured(5)
        if packed:  # starts, an int64 a step
            growth -= 5 * 8
        assert growth == tokens * 32 * each * (2 if bidirectional else 1)


def test_recompute_off_the_kernels_changes_nothing():
    module = triton_lstm.LSTM(FEATURES, H, recompute=True, backend="torch")
    twin = nn.LSTM(FEATURES, H)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(T, B, FEATURES)
    assert torch.equal(module(x)[0], twin(x)[0])


def test_states_never_go_to_the_faster_path(device, monkeypatch):
    """PyTorch's own LSTM cannot return them, whatever a table says about its speed."""
    monkeypatch.setattr("triton_lstm.dispatch.why_torch_is_faster", lambda *_: Reason.FASTER.why(1.0, 2.0))
    monkeypatch.setattr("triton_lstm.stack.layer_by_torch", lambda *_: pytest.fail("not by the kernels"))
    module = triton_lstm.LSTM(FEATURES, H).to(device)
    assert len(module(torch.randn(T, B, FEATURES, device=device), return_states=True)[2][0]) == 5


def test_states_of_a_meta_tensor():
    module = triton_lstm.LSTM(FEATURES, H, device="meta")
    states = module(torch.randn(T, B, FEATURES, device="meta"), return_states=True)[2]
    assert [t.shape for t in states[0]] == [(T, B, H)] * 5


def test_recompute_must_be_a_bool():
    with pytest.raises(TypeError, match="recompute should be of type bool, got: int"):
        triton_lstm.LSTM(FEATURES, H, recompute=1)
