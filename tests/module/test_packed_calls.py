"""Packed rows through other interfaces: lengths=, functional lstm(), PyTorch's path; and what is refused."""

import pytest
import torch
from oracle import flat, state_shapes, twins
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import triton_lstm
from triton_lstm.functional import lstm

CLOSE = dict(rtol=1e-4, atol=1e-5)
KINDS = [dict(), dict(num_layers=2, bidirectional=True), dict(batch_first=True, proj_size=2, bidirectional=True)]
zeros = torch.zeros


def packed(features=4, **changes) -> PackedSequence:
    """Three sequences of 2, 4 and 1 steps, for an LSTM(4, 6)."""
    x = pack_padded_sequence(torch.randn(4, 3, features), torch.tensor([2, 4, 1]), enforce_sorted=False)
    return x._replace(**changes)


BAD_HX = {
    "batch of h0": lambda: (zeros(2, 2, 6), zeros(2, 3, 6)),
    "batch of c0": lambda: (zeros(2, 3, 6), zeros(2, 4, 6)),
    "larger batch": lambda: (zeros(2, 5, 6), zeros(2, 5, 6)),
    "hidden size": lambda: (zeros(2, 3, 5), zeros(2, 3, 6)),
    "cell size": lambda: (zeros(2, 3, 6), zeros(2, 3, 7)),
    "directions": lambda: (zeros(1, 3, 6), zeros(1, 3, 6)),
    "2-D": lambda: (zeros(2, 6), zeros(2, 6)),
    "4-D": lambda: (zeros(1, 2, 3, 6), zeros(1, 2, 3, 6)),
}


def said(call):
    with pytest.raises((ValueError, RuntimeError)) as raised:
        call()
    return type(raised.value), str(raised.value)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("case", BAD_HX)
def test_a_wrong_hx_is_refused_with_the_message_for_padded_input(case, backend, device):
    theirs, ours = twins(device, backend=backend, bidirectional=True)
    hx = tuple(state.to(device) for state in BAD_HX[case]())
    expected = said(lambda: theirs(zeros(4, 3, 4), BAD_HX[case]()))
    got = said(lambda: ours(packed().to(device), hx))
    # of a dimension too few or too many, nn.LSTM speaks before it looks at sizes
    assert got == expected if hx[0].dim() == 3 else got[1].startswith("Expected hidden[0] size (2, 3, 6), got")


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_wrong_input_is_refused_with_the_message_for_padded_input(backend, device):
    theirs, ours = twins(device, backend=backend)
    for bad, x in ((packed(5), zeros(4, 3, 5)), (packed().double(), zeros(4, 3, 4).double())):
        assert said(lambda bad=bad: ours(bad.to(device))) == said(lambda x=x: theirs(x))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_other_wrong_packed_calls_are_refused(backend, device):
    ours = triton_lstm.LSTM(4, 6, backend=backend).to(device)
    x = packed().to(device)
    state = zeros(1, 3, 6, device=device)
    with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
        ours(x._replace(sorted_indices=None, unsorted_indices=None), (state, state, state))
    with pytest.raises(RuntimeError, match="input must have 2 dimensions, got 3"):
        ours(x._replace(data=x.data[:, None]))
    with pytest.raises(ValueError, match=r"hx\[1\] has dtype torch.float64, the input torch.float32"):
        ours(x, (state, state.double()))
    with pytest.raises(RuntimeError, match=r"not at the same device, found input tensor at .* hidden tensor at meta"):
        ours(x, (state.to("meta"), state))


BAD_SIZES = {
    "int32": (torch.tensor([3, 2, 1, 1], dtype=torch.int32), "1-D int64 tensor on the CPU"),
    "float": (torch.tensor([3.0, 2, 1, 1]), "1-D int64 tensor on the CPU"),
    "2-D": (torch.tensor([[3, 2, 1, 1]]), "1-D int64 tensor on the CPU"),
    "another device": (torch.tensor([3, 2, 1, 1], device="meta"), "1-D int64 tensor on the CPU"),
    "growing": (torch.tensor([2, 3, 1, 1]), "non-increasing"),
    "too many rows": (torch.tensor([3, 2, 2, 1]), "sum to the 7 rows"),
    "too few rows": (torch.tensor([3, 2, 1]), "sum to the 7 rows"),
    "zero": (torch.tensor([4, 3, 0]), "must be positive"),
    "negative": (torch.tensor([4, 4, -1]), "must be positive"),
    "empty": (torch.tensor([], dtype=torch.int64), "sequence length to be larger than 0"),
}


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("case", BAD_SIZES)
def test_wrong_batch_sizes_are_refused(case, backend, device):
    module = triton_lstm.LSTM(4, 6).to(device)
    sizes, message = BAD_SIZES[case]
    with pytest.raises(RuntimeError, match=message):
        lstm(zeros(7, 4, device=device), None, list(module.parameters()), batch_sizes=sizes, backend=backend)


def test_batch_sizes_need_flat_rows(device):
    module = triton_lstm.LSTM(4, 6).to(device)
    with pytest.raises(RuntimeError, match="input must have 2 dimensions, got 3"):
        lstm(zeros(7, 1, 4, device=device), None, list(module.parameters()), batch_sizes=torch.tensor([7]))


def test_the_function_keeps_the_order_of_the_rows(device):
    """hx, h_n and c_n of lstm() are in the packed rows' order; the module's are in the batch's."""
    torch.manual_seed(0)
    module = triton_lstm.LSTM(4, 6, bidirectional=True, backend="triton").to(device)
    x = packed().to(device)
    hx = tuple(torch.randn(shape, device=device) for shape in state_shapes(module, 3))
    y, (h_n, c_n) = module(x, hx)
    in_order = module.permute_hidden(hx, x.sorted_indices)
    params = list(module.parameters())
    got = lstm(x.data, in_order, params, bidirectional=True, batch_sizes=x.batch_sizes, backend="triton")
    expected = (y.data, *module.permute_hidden((h_n, c_n), x.sorted_indices))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not torch.equal(got[1], h_n)


@pytest.mark.parametrize("kwargs", KINDS, ids=str)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_pytorchs_path_is_nn_lstm_bit_for_bit(backend, kwargs, monkeypatch):
    monkeypatch.setattr("triton_lstm.dispatch.kernels_are_interpreted", lambda: False)
    theirs, ours = twins(backend=backend, **kwargs)
    x = packed()
    hx = tuple(torch.randn(shape) for shape in state_shapes(ours, 3))
    for state in (None, hx):
        (y, h_c), (y_, h_c_) = ours(x, state), theirs(x, state)
        assert all(torch.equal(a, b) for a, b in zip((y.data, *h_c), (y_.data, *h_c_), strict=True))


AS_GIVEN = {"list": list, "int64": torch.tensor, "int32": lambda n: torch.tensor(n, dtype=torch.int32), "tuple": tuple}


@pytest.mark.parametrize("kwargs", KINDS, ids=str)
@pytest.mark.parametrize("given", AS_GIVEN)
@pytest.mark.parametrize("with_hx", [False, True])
def test_lengths_are_packing(with_hx, given, kwargs, device):
    """Against nn.LSTM on packed rows: output, h_n, c_n and every gradient; T is kept, even if all are shorter."""
    theirs, ours = twins(device, backend="triton", **kwargs)
    lengths, first = [2, 4, 1], kwargs.get("batch_first", False)
    x = torch.randn(3, 5, 4) if first else torch.randn(5, 3, 4)
    hx = tuple(torch.randn(shape) for shape in state_shapes(theirs, 3)) if with_hx else ()
    results = []
    for module, place in ((ours, device), (theirs, "cpu")):
        rows, *states = (t.to(place, copy=True).requires_grad_() for t in (x, *hx))
        state = tuple(states) or None
        if module is ours:
            y, h_c = module(rows, state, lengths=AS_GIVEN[given](lengths))
        else:
            y, h_c = module(pack_padded_sequence(rows, torch.tensor(lengths), first, enforce_sorted=False), state)
            y = pad_packed_sequence(y, first, total_length=5)[0]
        generator = torch.Generator().manual_seed(3)
        outputs = [y, *h_c]
        cotangents = [torch.randn(t.shape, generator=generator).to(place) for t in outputs]
        grads = torch.autograd.grad(outputs, [rows, *states, *module.parameters()], cotangents)
        results.append([t.detach().cpu() for t in (*outputs, *grads)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)
    padding = torch.arange(5)[:, None] >= torch.tensor(lengths)
    y, dx = (results[0][k].transpose(0, 1) if first else results[0][k] for k in (0, 3))
    assert not y[padding].any() and not dx[padding].any() and dx[~padding].any(-1).all()


def test_lengths_with_states_returned(device):
    module = triton_lstm.LSTM(4, 6, 2, bidirectional=True, backend="triton").to(device)
    x = torch.randn(5, 3, 4, device=device)
    y, (h_n, c_n), layers = module(x, lengths=[2, 5, 1], return_states=True)
    assert len(layers) == 2 and all(t.shape == (5, 3, 12) for states in layers for t in states)
    last = layers[1]
    torch.testing.assert_close(last.o * last.c.tanh(), y)
    assert not last.i[2:, 0].any() and last.i[:2, 0].all()
    for of_all, of_last in ((last.c, c_n), (y, h_n)):
        ends = torch.stack([of_all[[1, 4, 0], [0, 1, 2], :6], of_all[0, :, 6:]])
        torch.testing.assert_close(ends, of_last[2:])


def test_lengths_of_an_empty_batch(device):
    module = triton_lstm.LSTM(4, 6, backend="triton").to(device)
    for lengths in ([], torch.tensor([], dtype=torch.int64)):
        y, (h_n, c_n) = module(zeros(3, 0, 4, device=device), lengths=lengths)
        assert y.shape == (3, 0, 6) and h_n.shape == c_n.shape == (1, 0, 6)


def test_an_empty_batch_is_checked_as_any_other(device):
    module = triton_lstm.LSTM(4, 6, backend="triton").to(device)
    x, wrong = zeros(3, 0, 4, device=device), zeros(1, 0, 5, device=device)
    assert module(x, lengths=[], return_states=True)[2][0].c.shape == (3, 0, 6)
    with pytest.raises(RuntimeError, match="Expected hidden"):
        module(x, (wrong, wrong), lengths=[])
    with pytest.raises(ValueError, match="resets"):
        module(x, lengths=[], resets=zeros(2, 0, dtype=torch.bool, device=device))


@pytest.mark.parametrize("batch_first", [False, True])
def test_recorded_gradients_have_the_layout_of_the_input(batch_first, device):
    module = triton_lstm.LSTM(4, 6, batch_first=batch_first, backend="triton").to(device)
    x, lengths = torch.randn((3, 5, 4) if batch_first else (5, 3, 4), device=device, requires_grad=True), [2, 1, 4]
    with triton_lstm.record_gradients(module) as grads:
        module(x, lengths=lengths)[0].sum().backward()
    assert torch.equal(grads.input, x.grad) and grads.h0.shape == (3, 6)
    rows = pack_padded_sequence(x.detach(), lengths, batch_first, enforce_sorted=False)
    rows.data.requires_grad_()
    with triton_lstm.record_gradients(module) as grads:
        y = module(rows)[0]
        y.data.sum().backward()
    for like_rows in (y, grads.input):
        for got, expected in zip(like_rows[1:], rows[1:], strict=True):
            assert torch.equal(got, expected)
    assert torch.equal(grads.input.data, rows.data.grad)


def test_recorded_gradients_of_one_sequence_have_its_axis(device):
    module = triton_lstm.LSTM(4, 6, backend="triton").to(device)
    with triton_lstm.record_gradients(module) as grads:
        module(torch.randn(5, 1, 4, device=device), lengths=[3])[0].sum().backward()
    assert grads.h0.shape == (1, 6) and grads.input.shape == (5, 1, 4)


def test_lengths_with_resets(device):
    module = triton_lstm.LSTM(4, 6, backend="triton").to(device)
    x, resets = torch.randn(5, 3, 4, device=device), zeros(5, 3, dtype=torch.bool, device=device)
    resets[2, 1] = True
    y = module(x, lengths=[2, 5, 1], resets=resets)[0]
    torch.testing.assert_close(y[2:, 1], module(x[2:, 1])[0], **CLOSE)
    torch.testing.assert_close(y[:2, 1], module(x[:2, 1])[0], **CLOSE)


BAD_LENGTHS = {
    "too long": ([2, 6, 1], "between 1 and the input's 5 steps, got \\[2, 6, 1\\]"),
    "zero": ([2, 0, 1], "between 1 and the input's 5 steps, got \\[2, 0, 1\\]"),
    "negative": ([2, -1, 1], "between 1 and the input's 5 steps"),
    "floats": ([2.0, 3.0, 1.0], "3 integers, one per sequence, got torch.float32"),
    "bools": ([True, True, True], "3 integers, one per sequence, got torch.bool"),
    "too few": ([2, 3], "3 integers, one per sequence, got torch.int64 \\(2,\\)"),
    "2-D": ([[2, 3, 1]], "3 integers, one per sequence"),
    "a number": (3, "3 integers, one per sequence"),
    "none": ([], "3 integers, one per sequence"),
}


@pytest.mark.parametrize("case", BAD_LENGTHS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_wrong_lengths_are_refused(case, backend):
    lengths, message = BAD_LENGTHS[case]
    with pytest.raises(ValueError, match=message):
        triton_lstm.LSTM(4, 6, backend=backend)(zeros(5, 3, 4), lengths=lengths)


def test_lengths_go_with_a_padded_batch_only():
    module = triton_lstm.LSTM(4, 6)
    for x in (packed(), zeros(5, 4), zeros(4)):
        with pytest.raises(ValueError, match="lengths goes with a padded batch, a 3-D tensor"):
            module(x, lengths=[2, 4, 1])


def test_a_packed_sequence_has_no_empty_batch():
    """Which is why nothing here runs one: pack_padded_sequence refuses it, and so does nn.LSTM by hand."""
    with pytest.raises(RuntimeError):
        pack_padded_sequence(zeros(3, 0, 4), torch.tensor([], dtype=torch.int64))
    nobody = PackedSequence(zeros(0, 4), torch.tensor([], dtype=torch.int64))
    for module in (nn.LSTM(4, 6), triton_lstm.LSTM(4, 6)):
        with pytest.raises((RuntimeError, IndexError)):
            flat(module(nobody))


@pytest.mark.parametrize("both", [False, True])
def test_recomputed_gates_start_from_h0(both, device):
    """The same bits or nearly, with the gates kept or made again from a state that is not zero."""
    theirs, ours = twins(device, backend="triton", bidirectional=both)
    x, hx = packed(), tuple(torch.randn(shape) for shape in state_shapes(theirs, 3))
    grads = []
    for ours.recompute in (False, True):
        state = tuple(t.to(device, copy=True).requires_grad_() for t in hx)
        y, h_c = ours(x.to(device), state)
        grads.append(torch.autograd.grad(y.data.sum() + sum(t.sum() for t in h_c), [*state, *ours.parameters()]))
    for kept, made in zip(*grads, strict=True):
        torch.testing.assert_close(made, kept, **CLOSE)


def test_the_default_device_does_not_matter(device):
    module = triton_lstm.LSTM(3, 4, backend="triton").to(device)
    x = torch.randn(4, 2, 3, device=device)
    packed = pack_padded_sequence(x, [4, 2])
    expected = module(packed)[0].data, module(x, lengths=[4, 2])[0]
    with torch.device("meta"):
        got = module(packed)[0].data, module(x, lengths=[4, 2])[0]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("lengths", ["ab", [2, None], {2: 1}], ids=str)
def test_lengths_that_are_no_numbers_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths must be 2 integers, one per sequence"):
        triton_lstm.LSTM(3, 4)(torch.randn(4, 2, 3), lengths=lengths)
