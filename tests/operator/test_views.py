"""output, h_n and c_n lie in memory as nn.LSTM's do on the CPU, and can be changed in place where its can."""

import itertools

import pytest
import torch
from oracle import data_of, flat, twins
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import triton_lstm

T = 2
KINDS = [
    dict(),
    dict(bidirectional=True),
    dict(proj_size=2),
    dict(bidirectional=True, proj_size=2),
    dict(num_layers=2),
    dict(num_layers=2, bidirectional=True, proj_size=2),
]


def padded(batch, batch_first):
    return torch.randn((batch, T, 4) if batch_first else (T, batch, 4))


def packed(*lengths, enforce_sorted=True):
    def call(module):
        x = padded(len(lengths), module.batch_first)
        return module(pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted))

    return call


def with_lengths(module):
    x, lengths = padded(3, module.batch_first), [1, T, 1]
    if isinstance(module, triton_lstm.LSTM):
        return module(x, lengths=lengths)
    y, states = module(pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=False))
    return pad_packed_sequence(y, module.batch_first, total_length=T)[0], states


LAYOUTS = {
    "dense-1": lambda m: m(padded(1, m.batch_first)),
    "dense-3": lambda m: m(padded(3, m.batch_first)),
    "unbatched": lambda m: m(torch.randn(T, 4)),
    "packed-1": packed(T),
    "packed-3": packed(T, T, 1),
    "packed-same": packed(T, T),
    "packed-unsorted-1": packed(T, enforce_sorted=False),
    "packed-unsorted-3": packed(1, T, 1, enforce_sorted=False),
    "lengths": with_lengths,
}


def raised(change):
    try:
        change()
    except RuntimeError as error:
        return str(error)


def described(call, grad):
    """How the results of `call` lie in memory, and what is said to changes of them in place."""
    with torch.set_grad_enabled(grad):
        y, (h_n, c_n) = call()
    results, start = (data_of(y), h_n, c_n), torch.zeros((), requires_grad=True)
    return (
        [(t._is_view(), t.shape, t.stride(), t.storage_offset(), t.is_leaf, t.requires_grad) for t in results],
        len({t.untyped_storage().data_ptr() for t in results}),
        [raised(lambda t=t: t.select(-1, 1).add_(1)) for t in (h_n, c_n)],
        raised(lambda: sum(t.sum() for t in results).backward()) if grad else None,  # h_n and c_n are not saved
        [raised(lambda t=t: t[..., 1].copy_(start)) for t in results],
        [raised(lambda t=t: t.detach_()) for t in results],
    )


@pytest.fixture(params=["triton", "torch"])
def backend(request):
    """What can run on the CPU, where nn.LSTM's results are compared."""
    if request.param == "triton":
        request.getfixturevalue("interpreter")
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_views_where_those_of_nn_lstm_are(layout, backend):
    for kwargs, batch_first, grad in itertools.product(KINDS, [False, True], [False, True]):
        theirs, ours = twins(backend=backend, batch_first=batch_first, **kwargs)
        expected, got = (described(lambda m=m: LAYOUTS[layout](m), grad) for m in (theirs, ours))
        assert got == expected, (kwargs, batch_first, grad)


@pytest.mark.parametrize("layout", ["dense-1", "dense-3", "unbatched"])
def test_a_compiled_graph_makes_none_a_view_that_is_none(layout, backend):
    """It may return what is no view in the place of one, as every compiled graph does."""
    for kwargs, batch_first, grad in [(KINDS[0], False, True), (KINDS[1], False, False), (KINDS[3], True, True)]:
        _, ours = twins(backend=backend, batch_first=batch_first, **kwargs)
        with torch.set_grad_enabled(grad):
            expected = flat(LAYOUTS[layout](ours))
            torch._dynamo.reset()
            ours.compile(backend="aot_eager", fullgraph=True)
            graphs = [
                flat(LAYOUTS[layout](ours)) for _ in range(3)
            ]  # the first call may run what is compiled otherwise
        for b, a in ((b, a) for got in graphs for b, a in zip(expected, got, strict=True)):
            assert a.shape == b.shape and a._is_view() <= b._is_view()
            assert [s for s, size in zip(a.stride(), a.shape, strict=True) if size > 1] == [
                s for s, size in zip(b.stride(), b.shape, strict=True) if size > 1
            ]
        assert all(len({t.untyped_storage().data_ptr() for t in got}) == 3 for got in graphs)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("compiled", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("both", [False, True])
def test_truncated_backpropagation_detaches_in_place(both, compiled, batch, backend, device):
    """And states of a call without gradients take values that have one."""
    module = triton_lstm.LSTM(4, 6, bidirectional=both, backend=backend).to(device)
    if compiled:
        module.compile(backend=compiled)
    hx, start = None, torch.ones(6, device=device, requires_grad=True)
    for _ in range(3):
        y, hx = module(torch.randn(T, batch, 4, device=device), hx)
        y.sum().backward()
        for state in hx:
            state.detach_()
    for _ in range(2):
        with torch.no_grad():
            _, states = module(torch.randn(T, batch, 4, device=device))
    for state in states:
        start.grad = None
        state[:, 0] = start
        state.sum().backward()
        assert start.grad.eq(2 if both else 1).all()
    torch._dynamo.reset()
