"""resets= and cu_seqlens= under torch.compile, torch.export, torch.func, torch.jit.trace, and differentiated twice."""

import io
import operator

import pytest
import torch
from oracle import run, state_shapes
from segments_alone import alone
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import triton_lstm

ALL = dict(num_layers=2, bidirectional=True, proj_size=2, batch_first=True)
T, B = 5, 3


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def module_and_input(device, dtype=torch.float32, backend="triton", steps=T, batch=B, **kwargs):
    """The module, x and resets of its layout, and hx."""
    torch.manual_seed(0)
    module = triton_lstm.LSTM(3, 4, **kwargs, backend=backend).to(device, dtype)
    return module, *inputs_of(module, steps, batch)


def inputs_of(module, steps, batch):
    like = module.weight_hh_l0
    shape = (batch, steps) if module.batch_first else (steps, batch)
    resets = torch.rand(shape) < 0.4
    hx = tuple(torch.randn(s).to(like) for s in state_shapes(module, batch))
    return torch.randn(*shape, 3).to(like), resets.to(like.device), hx


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("kwargs", [{}, ALL], ids=str)
def test_one_graph_for_all_sizes(kwargs, backend, device):
    module, *_ = module_and_input(device, backend=backend, **kwargs)
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for steps, batch in [(5, 6), (7, 9), (9, 5)]:
        x, resets, hx = inputs_of(module, steps, batch)
        got, expected = (
            run(module, x, hx, call=lambda m, x, hx, call=call, resets=resets: call(x, hx, resets=resets))
            for call in (compiled, module)
        )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("where", ["cpu", "there"])
def test_cu_seqlens_in_a_graph(where, backend, device):
    module, x, _, hx = module_and_input(device, backend=backend, batch=1, num_layers=2)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for cuts in ([0, 2, T], [0, 1, T], [0, 4, T]):
        cu_seqlens = torch.tensor(cuts, dtype=torch.int32, device="cpu" if where == "cpu" else device)
        got, expected = (
            run(module, x, hx, call=lambda m, x, hx, call=call, c=cu_seqlens: call(x, hx, cu_seqlens=c))
            for call in (compiled, module)
        )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_functional_in_a_graph(device):
    module, x, resets, hx = module_and_input(device)
    params = list(module.parameters())

    def call(x, resets):
        return triton_lstm.lstm(x, hx, params, resets=resets, backend="triton")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    y, (h_n, c_n) = module(x, hx, resets=resets)
    torch.testing.assert_close(compiled(x, resets), (y, h_n, c_n), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict, device):
    module, x, resets, hx = module_and_input(device, **ALL)
    steps, batch = torch.export.Dim("steps", min=2, max=64), torch.export.Dim("batch", min=2, max=64)
    shapes = {"input": {0: batch, 1: steps}, "hx": ({1: batch}, {1: batch}), "resets": {0: batch, 1: steps}}
    program = torch.export.export(module, (x, hx), dict(resets=resets), dynamic_shapes=shapes, strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for sizes in [(3, 2), (7, 4)]:
        x, resets, hx = inputs_of(module, *sizes)
        torch.testing.assert_close(loaded(x, hx, resets=resets), module(x, hx, resets=resets))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_has_none(dynamo, device):
    pytest.importorskip("onnxscript")
    module, x, resets, hx = module_and_input(device, backend=None)
    with pytest.raises(Exception, match="ONNX's LSTM operator has no resets"):
        torch.onnx.export(module, (x, hx), io.BytesIO(), kwargs=dict(resets=resets), dynamo=dynamo, verbose=False)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:DeprecationWarning")
def test_traced_with_other_resets(device):
    """They are an input of the trace and no part of it."""
    module, x, resets, _ = module_and_input(device, backend=None, num_layers=2, bidirectional=True)

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x, resets):
            return self.inner(x, resets=resets)[0]

    traced = torch.jit.trace(Called(), (x, resets), check_trace=False)
    _, others, _ = inputs_of(module, T, B)
    assert not torch.equal(others, resets)
    torch.testing.assert_close(traced(x, others), module(x, resets=others)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("mapped", ["x", "resets", "both", "weights"])
@pytest.mark.parametrize("kwargs", [dict(bidirectional=True), dict(proj_size=2)], ids=str)
def test_vmap(kwargs, mapped, backend, device, precise):
    dtype, close = precise
    module, x, resets, hx = module_and_input(device, dtype, backend, **kwargs)
    many = [inputs_of(module, T, B) for _ in range(3)]
    xs, all_resets = torch.stack([x for x, _, _ in many]), torch.stack([resets for _, resets, _ in many])
    params = dict(module.named_parameters())
    stacked = {name: torch.stack([p, 2 * p, -p]) for name, p in params.items()}

    def gradient(params, x, resets):
        def loss(x):
            y, (h_n, c_n) = functional_call(module, params, (x, hx), dict(resets=resets))
            return y.square().sum() + h_n.sum() + c_n.cos().sum()

        return grad(loss)(x)

    in_dims = [None, 0 if mapped in ("x", "both") else None, 0 if mapped in ("resets", "both") else None]
    given = [params, xs if in_dims[1] == 0 else x, all_resets if in_dims[2] == 0 else resets]
    if mapped == "weights":
        in_dims, given[0] = [0, None, None], stacked
    got = vmap(gradient, in_dims=tuple(in_dims))(*given)
    for k in range(3):
        pairs = zip(given, in_dims, strict=True)
        one = [g if d is None else torch.utils._pytree.tree_map(operator.itemgetter(k), g) for g, d in pairs]
        torch.testing.assert_close(got[k], gradient(*one), **close)


def twice(module, x, hx, resets, call):
    """Gradients of a penalty on gradients."""
    x, *hx = (t.detach().clone().requires_grad_() for t in (x, *hx))
    y, (h_n, c_n) = call(module, x, tuple(hx), resets)
    first = torch.autograd.grad(y.square().sum() + h_n.sin().sum() + c_n.cos().sum(), [x, *hx], create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    return torch.autograd.grad(penalty, [x, *hx, *module.parameters()], materialize_grads=True)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kwargs", [{}, dict(num_layers=2, bidirectional=True), dict(proj_size=2)], ids=str)
def test_double_backward(kwargs, recompute, interpreter):
    module, x, resets, hx = module_and_input("cpu", torch.float64, recompute=recompute, **kwargs)
    twin = nn.LSTM(3, 4, **kwargs).double()
    twin.load_state_dict(module.state_dict())
    got = twice(module, x, hx, resets, lambda m, x, hx, resets: m(x, hx, resets=resets))
    torch.testing.assert_close(got, twice(twin, x, hx, resets, alone), rtol=1e-9, atol=1e-12)


def test_double_backward_of_packed_rows(interpreter):
    module, x, resets, hx = module_and_input("cpu", torch.float64, bidirectional=True)
    twin = nn.LSTM(3, 4, bidirectional=True).double()
    twin.load_state_dict(module.state_dict())
    lengths = torch.tensor([5, 3, 2])
    rows = pack_padded_sequence(x, lengths)
    resets = pack_padded_sequence(resets, lengths).data

    def packed(call):
        def of_rows(module, x, hx, resets):
            y, states = call(module, rows._replace(data=x), hx, resets)
            return y.data, states

        return of_rows

    got = twice(module, rows.data, hx, resets, packed(lambda m, x, hx, resets: m(x, hx, resets=resets)))
    torch.testing.assert_close(got, twice(twin, rows.data, hx, resets, packed(alone)), rtol=1e-9, atol=1e-12)


def test_a_nan_does_not_cross_in_double_backward(device):
    module, x, _, hx = module_and_input(device)
    resets = torch.zeros(T, B, dtype=torch.bool, device=device)
    resets[2, 1] = True
    x[0, 1, 0] = float("nan")
    x.requires_grad_()
    y = module(x, hx, resets=resets)[0]
    (first,) = torch.autograd.grad(y[2:].square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[2:].square().sum(), x)
    assert second[2:].isfinite().all() and second[:, [0, 2]].isfinite().all()


def test_gradients_of_a_batch_of_cotangents(device, precise):
    """autograd.grad(is_grads_batched=True), which takes neither kernels nor a vmap rule."""
    dtype, close = precise
    module, x, resets, hx = module_and_input(device, dtype, bidirectional=True)
    x.requires_grad_()
    y = module(x, hx, resets=resets)[0]
    dys = torch.randn(2, *y.shape).to(y)
    (got,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys]
    torch.testing.assert_close(got, torch.stack(expected), **close)


def test_resets_changed_before_the_backward_pass_are_an_error(device):
    module, x, resets, hx = module_and_input(device)
    y = module(x, hx, resets=resets)[0]
    resets.fill_(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
