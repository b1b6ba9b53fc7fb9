"""torch.func on the module: against nn.LSTM in float64, and with how many launches."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils.rnn import PackedSequence

import triton_lstm

KWARGS = {
    "one layer": {},
    "bidirectional": dict(bidirectional=True),
    "layers": dict(num_layers=2),
    "all": dict(num_layers=2, bidirectional=True, proj_size=2, batch_first=True),
}


@pytest.fixture
def launches(monkeypatch):
    """The batch of every launch."""
    seen = {"forward": [], "backward": []}
    import triton_lstm.operator.layer

    for name, batches in seen.items():
        shipped = getattr(triton_lstm.operator.layer, f"lstm_{name}")

        def spy(*args, shipped=shipped, batches=batches, rows=0 if name == "forward" else 5, **kwargs):
            lengths = kwargs["lengths"]
            batches.append(args[rows].shape[1] if lengths is None else len(lengths))
            return shipped(*args, **kwargs)

        monkeypatch.setattr(triton_lstm.operator.layer, f"lstm_{name}", spy)
    return seen


def pair(device, dtype, **kwargs):
    """Ours on the device, and nn.LSTM on the CPU in float64."""
    torch.manual_seed(0)
    theirs = nn.LSTM(3, 4, **kwargs).double()
    ours = triton_lstm.LSTM(3, 4, **kwargs, backend="triton").to(device, dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def draw(module, *shape):
    like = next(module.parameters())
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)


def cpu(tree):
    return torch.utils._pytree.tree_map(lambda t: t.detach().cpu().double(), tree)


def loss_of(module):
    def loss(params, x):
        y, (h_n, c_n) = functional_call(module, params, (x,))
        return y.square().sum() + h_n.sin().sum() + c_n.cos().sum()

    return loss


@pytest.mark.parametrize("transform", [grad, jacrev, lambda f: jacrev(jacrev(f))], ids=["grad", "jacrev", "twice"])
def test_derivatives(transform, device, precise):
    dtype, close = precise
    ours, theirs = pair(device, dtype)
    got, expected = (transform(lambda x, m=m: m(x)[0].square().sum())(draw(m, 3, 2, 3)) for m in (ours, theirs))
    torch.testing.assert_close(cpu(got), expected, **close)


def test_gradients_of_all_parameters(device, precise):
    dtype, close = precise
    ours, theirs = pair(device, dtype, **KWARGS["all"])
    got, expected = (grad(loss_of(m))(dict(m.named_parameters()), draw(m, 2, 3, 3)) for m in (ours, theirs))
    torch.testing.assert_close(cpu(got), cpu(expected), **close)


@pytest.mark.parametrize("transform", [jacfwd, hessian, lambda f: lambda x: jvp(f, (x,), (x,))])
def test_forward_derivatives_say_what_to_take_instead(transform, device):
    ours, _ = pair(device, torch.float32)
    with pytest.raises(NotImplementedError, match=r'no forward derivative \(jvp, jacfwd\).*backend="torch" in float64'):
        transform(lambda x: ours(x)[0].sum())(draw(ours, 3, 2, 3))
    ours.double().backend = "torch"
    if device.type == "cpu":
        transform(lambda x: ours(x)[0].sum())(draw(ours, 3, 2, 3))


@pytest.mark.parametrize("kwargs", KWARGS.values(), ids=KWARGS)
def test_mapped_input_is_folded_into_the_batch(kwargs, device, precise, launches):
    dtype, close = precise
    ours, theirs = pair(device, dtype, **kwargs)
    xs = draw(ours, 5, 2, 2, 3)
    got = vmap(ours)(xs)
    expected = [theirs(x) for x in cpu(xs)]
    torch.testing.assert_close(cpu(got[0]), torch.stack([y for y, _ in expected]), **close)
    for k in (0, 1):
        torch.testing.assert_close(cpu(got[1][k]), torch.stack([states[k] for _, states in expected]), **close)
    assert launches["forward"] == [10] * ours.num_layers


@pytest.mark.parametrize(("in_dims", "out_dims"), [((0, 0), 0), ((1, 2), 1), ((3, None), 2), ((None, 1), -1)])
def test_mapped_axes_may_be_anywhere(in_dims, out_dims, device, precise, launches):
    """Of the input, of hx or of both; of the results."""
    dtype, close = precise
    ours, theirs = pair(device, dtype)
    shapes = [(3, 2, 3), (1, 2, 4)]
    tensors = [
        draw(ours, *shape, 5).movedim(-1, d) if d is not None else draw(ours, *shape)
        for shape, d in zip(shapes, in_dims, strict=True)
    ]

    def call(module, x, h):
        return module(x, (h, h.cos()))[0]

    got = vmap(lambda x, h: call(ours, x, h), in_dims, out_dims)(*tensors)
    each = [[t if d is None else t.select(d, k) for t, d in zip(cpu(tensors), in_dims, strict=True)] for k in range(5)]
    expected = torch.stack([call(theirs, *inputs) for inputs in each], out_dims)
    torch.testing.assert_close(cpu(got), expected, **close)
    assert launches["forward"] == [10]


def test_nested_maps_are_one_launch(device, precise, launches):
    dtype, close = precise
    ours, theirs = pair(device, dtype, bidirectional=True)
    xs = draw(ours, 2, 3, 4, 2, 3)
    got = vmap(vmap(lambda x: ours(x)[1][1], in_dims=1), out_dims=1)(xs.transpose(1, 2))
    expected = torch.stack([torch.stack([theirs(x)[1][1] for x in row]) for row in cpu(xs)])
    torch.testing.assert_close(cpu(got).transpose(0, 1), expected, **close)
    assert launches["forward"] == [12]


@pytest.mark.parametrize("kwargs", KWARGS.values(), ids=KWARGS)
def test_gradients_of_every_sample_are_one_launch(kwargs, device, precise, launches):
    dtype, close = precise
    ours, theirs = pair(device, dtype, **kwargs)
    xs = draw(ours, 3, 2, 1, 3) if not ours.batch_first else draw(ours, 3, 1, 2, 3)
    got = vmap(grad(loss_of(ours)), in_dims=(None, 0))(dict(ours.named_parameters()), xs)
    for k, x in enumerate(cpu(xs)):
        theirs.zero_grad()
        loss_of(theirs)(dict(theirs.named_parameters()), x).backward()
        expected = {name: p.grad for name, p in theirs.named_parameters()}
        torch.testing.assert_close(cpu({name: g[k] for name, g in got.items()}), expected, **close)
    assert launches == {"forward": [3] * ours.num_layers, "backward": [3] * ours.num_layers}


def test_chunks_are_launches(device, precise, launches):
    dtype, close = precise
    ours, theirs = pair(device, dtype)
    xs = draw(ours, 5, 3, 1, 3)
    got = vmap(grad(lambda x: ours(x)[0].square().sum()), chunk_size=2)(xs)
    expected = torch.stack([grad(lambda x: theirs(x)[0].square().sum())(x) for x in cpu(xs)])
    torch.testing.assert_close(cpu(got), expected, **close)
    assert launches == {"forward": [2, 2, 1], "backward": [2, 2, 1]}


def test_ensemble_of_weights_runs_one_by_one(device, precise, launches):
    dtype, close = precise
    pairs = [pair(device, dtype, num_layers=2) for _ in range(3)]
    for k, (ours, theirs) in enumerate(pairs):
        with torch.no_grad():
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                p.mul_(1 + k)
                q.mul_(1 + k)
    params, _ = stack_module_state([ours for ours, _ in pairs])
    base = copy.deepcopy(pairs[0][0]).to("meta")
    x = draw(pairs[0][0], 3, 2, 3)
    got = vmap(grad(loss_of(base)), in_dims=(0, None))(params, x)
    for k, (_, theirs) in enumerate(pairs):
        expected = grad(loss_of(theirs))(dict(theirs.named_parameters()), cpu(x))
        torch.testing.assert_close(cpu({name: g[k] for name, g in got.items()}), cpu(expected), **close)
    assert launches == {"forward": [2] * 6, "backward": [2] * 6}


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_in_a_map(randomness, device):
    """One mask for all elements, or one for each; unsaid it is PyTorch's error."""
    ours, _ = pair(device, torch.float32, num_layers=2, dropout=0.5)
    xs = draw(ours, 1, 3, 2, 3).expand(4, -1, -1, -1)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(ours)(xs)
    y, _ = vmap(ours, randomness=randomness)(xs)
    assert all(torch.equal(y[0], other) for other in y[1:]) == (randomness == "same")


def test_mapped_packed_rows_run_one_by_one(device, precise, launches):
    dtype, close = precise
    ours, theirs = pair(device, dtype, bidirectional=True)
    rows, sizes = draw(ours, 2, 5, 3), torch.tensor([2, 2, 1])

    def gradient(module):
        return grad(lambda rows: module(PackedSequence(rows, sizes))[0].data.square().sum())

    got = vmap(gradient(ours))(rows)
    for k, part in enumerate(cpu(rows).requires_grad_()):
        (expected,) = torch.autograd.grad(theirs(PackedSequence(part, sizes))[0].data.square().sum(), part)
        torch.testing.assert_close(cpu(got[k]), expected, **close)
    assert launches == {"forward": [2, 2], "backward": [2, 2]}


def test_pulled_back_after_the_call(device, precise):
    dtype, close = precise
    ours, theirs = pair(device, dtype)
    pulled = []
    for module in (ours, theirs):
        y, pull_back = vjp(lambda x, m=module: m(x)[0], draw(module, 3, 2, 3))
        pulled.append(cpu(vmap(pull_back)(torch.stack([torch.ones_like(y), y]).detach())))
    torch.testing.assert_close(*pulled, **close)


@pytest.mark.parametrize("shape", [(3, 1, 2), (3, 2), (1, 1, 2)], ids=str)
@pytest.mark.parametrize("kwargs", [dict(), dict(recompute=True), dict(bidirectional=True, proj_size=2)], ids=str)
def test_jacobians_of_a_single_sequence(shape, kwargs, device, precise):
    """A batch of one is expanded without a copy: what is saved has strides of zero."""
    dtype, close = precise
    module = triton_lstm.LSTM(2, 3, **kwargs, backend="triton").to(device, dtype)
    x = torch.randn(shape, dtype=dtype, device=device)
    for k in range(3):

        def output(x, k=k):
            y, states = module(x)
            return (y, *states)[k]

        by_rows = torch.autograd.functional.jacobian(output, x)
        torch.testing.assert_close(torch.func.jacrev(output)(x), by_rows, **close)


def test_the_jacobian_of_an_empty_batch(device):
    module = triton_lstm.LSTM(2, 3, backend="triton").to(device)
    jacobian = torch.func.jacrev(lambda x: module(x)[0])(torch.randn(3, 0, 2, device=device))
    assert jacobian.shape == (3, 0, 3, 3, 0, 2)


def test_lengths_are_refused(device):
    module = triton_lstm.LSTM(2, 3).to(device)
    with pytest.raises(RuntimeError, match="lengths= does not go through"):
        torch.func.grad(lambda x: module(x, lengths=[2, 1])[0].sum())(torch.randn(2, 2, 2, device=device))


def test_transforms_without_grad_mode(device, precise):
    """no_grad outside of a transform is not of its inside; and a vmap over autograd.grad of an eager call."""
    dtype, close = precise
    ours, theirs = pair(device, dtype)
    results = []
    for module in (ours, theirs):
        x = draw(module, 4, 2, 3)
        with torch.no_grad():
            jacobian = jacrev(lambda x, module=module: module(x)[0])(x)
        y, pull_back = vjp(lambda x, module=module: module(x)[0], x)
        with torch.no_grad():
            pulled = pull_back(torch.ones_like(y))[0]
        leaf = x.clone().requires_grad_()
        y = module(leaf)[0]
        cotangents = torch.stack([torch.ones_like(y), y.detach()])
        rows = [torch.autograd.grad(y, leaf, cotangent, retain_graph=True)[0] for cotangent in cotangents]
        if module is ours:
            row = functools.partial(torch.autograd.grad, y, leaf, retain_graph=True)
            together = vmap(row)(cotangents)[0]
            torch.testing.assert_close(together, torch.stack(rows), **close)
        results.append(cpu([jacobian, pulled, *rows]))
    torch.testing.assert_close(*results, **close)
