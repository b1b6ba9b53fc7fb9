"""PackedSequence: every output and every gradient against nn.LSTM, and no computation on padding."""

import pytest
import torch
from compiled import COMPILED
from oracle import assert_like_nn_lstm, state_shapes, twins
from pairs import all_pairs, case_id
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import triton_lstm
from triton_lstm.core.tolerance import enlarge
from triton_lstm.kernels import steps
from triton_lstm.planning.plan import Plan

FLOAT64_ON_GPU = "float64 on a GPU goes to PyTorch's own LSTM"
LENGTHS = {
    "equal": [3, 3, 3],
    "one long": [1, 1, 5, 1, 1],
    "T=1": [1, 1, 1],
    "B=1": [4],
    "B=17": [1, 4] + [2] * 14 + [4],  # a second batch tile of one row
    "B=20": [3, 1, 4, 2, 1] * 4,
}
FACTORS = {
    "lengths": list(LENGTHS),
    "layers": [1, 2],
    "both": [False, True],
    "proj": [0, 4],
    "bias": [False, True],
    "dtype": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "sorted": [False, True],
    "hx": [False, True],
    "recompute": [False, True],
    "plan": ["none", "flag", "barrier"],
    "H": [6, 8, 33],
}


def steps_apart(exchange: str, device: torch.device, **fields) -> Plan:
    """Several programs: in the interpreter a launch per step, on a GPU all steps in one."""
    tile = dict(resident=True, block_b=16, block_h=16, block_k=16, slices=1, groups=1, warps=4) | fields
    return Plan(exchange, COMPILED, **tile)


def packed(lengths, features, device="cpu", dtype=torch.float32, enforce_sorted=False):
    lengths = sorted(lengths, reverse=True) if enforce_sorted else lengths
    x = torch.randn(max(lengths), len(lengths), features).to(device, dtype)
    return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=enforce_sorted)


def states(module, batch):
    like = module.weight_ih_l0
    return tuple(torch.randn(shape).to(like) for shape in state_shapes(module, batch))


@pytest.mark.unmeasured
@pytest.mark.parametrize("case", all_pairs(FACTORS), ids=case_id)
def test_against_nn_lstm(case, device, monkeypatch):
    if case["dtype"] == torch.float64 and COMPILED:
        pytest.skip(FLOAT64_ON_GPU)
    if case["plan"] != "none":
        plan = steps_apart(case["plan"], device)
        monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: plan)
    torch.manual_seed(0)
    kwargs = dict(num_layers=case["layers"], bidirectional=case["both"], bias=case["bias"], proj_size=case["proj"])
    module = triton_lstm.LSTM(3, case["H"], **kwargs, recompute=case["recompute"], backend="triton")
    enlarge(module).to(device, case["dtype"])
    lengths = LENGTHS[case["lengths"]]

    def draw():
        x = packed(lengths, 3, device, case["dtype"], case["sorted"])
        return x, states(module, len(lengths)) if case["hx"] else None

    assert_like_nn_lstm(module, draw, **kwargs)


GROUPS = {
    "exchange": ["flag", "barrier"],
    "groups": [1, 2],
    "resident": [False, True],
    "slices": [1, 2],
    "block_k": [32, 64],
    "both": [False, True],
    "hx": [False, True],
}


@pytest.mark.unmeasured
@pytest.mark.parametrize("case", all_pairs(GROUPS), ids=case_id)
def test_batch_tiles_of_different_lengths(case, device, monkeypatch):
    """Three tiles, of four, two steps and one; taken in turn or side by side."""
    fields = {name: case[name] for name in ("groups", "resident", "slices", "block_k")}
    plan = steps_apart(case["exchange"], device, **fields)
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: plan)
    torch.manual_seed(0)
    kwargs = dict(bidirectional=case["both"])
    module = triton_lstm.LSTM(3, 20, **kwargs, backend="triton").to(device)
    lengths = [4, 3] + [2] * 24 + [1] * 8

    def draw():
        return packed(lengths, 3, device), states(module, len(lengths)) if case["hx"] else None

    assert_like_nn_lstm(module, draw, **kwargs)


@pytest.mark.parametrize("sorted_", [False, True])
def test_the_output_carries_the_indices(sorted_, device):
    module = triton_lstm.LSTM(3, 4, bidirectional=True, backend="triton").to(device)
    x = packed([2, 1, 4], 3, device, enforce_sorted=sorted_)
    y = module(x)[0]
    assert isinstance(y, PackedSequence)
    assert y.batch_sizes is x.batch_sizes
    assert y.sorted_indices is x.sorted_indices and y.unsorted_indices is x.unsorted_indices


@pytest.mark.parametrize("both", [False, True])
def test_padding_gets_exactly_no_gradient(both, device):
    module = triton_lstm.LSTM(3, 5, 2, bidirectional=both, backend="triton").to(device)
    lengths = torch.tensor([2, 4, 1])
    x = torch.randn(4, 3, 3, device=device, requires_grad=True)
    y = pad_packed_sequence(module(pack_padded_sequence(x, lengths, enforce_sorted=False))[0])[0]
    (y * torch.randn_like(y)).sum().backward()
    counts = torch.arange(4)[:, None] < lengths
    assert torch.equal((x.grad != 0).any(-1).cpu(), counts)


@pytest.mark.parametrize("output", [0, 1, 2], ids=["y", "h_n", "c_n"])
@pytest.mark.parametrize("both", [False, True])
def test_backward_through_one_output_only(output, both, device):
    theirs, ours = twins(device, backend="triton", num_layers=2, bidirectional=both)
    x = packed([1, 4, 2, 2], 4)
    hx = states(theirs, 4)

    def grads(module, place):
        rows = x.data.to(place, copy=True).requires_grad_()
        h0, c0 = (state.to(place, copy=True).requires_grad_() for state in hx)
        y, (h_n, c_n) = module(x.to(place)._replace(data=rows), (h0, c0))
        chosen = (y.data, h_n, c_n)[output]
        weights = torch.randn(chosen.shape, generator=torch.Generator().manual_seed(1))
        leaves = [rows, h0, c0, *module.parameters()]
        return torch.autograd.grad((chosen * weights.to(place)).sum(), leaves)

    assert x.sorted_indices is not None
    for got, expected in zip(grads(ours, device), grads(theirs, "cpu"), strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU uses other random numbers")
def test_dropout_is_that_of_nn_lstm():
    """On the packed rows, so that a seed gives nn.LSTM's own mask; none in eval mode."""
    theirs, ours = twins(backend="triton", num_layers=3, dropout=0.5)
    x = packed([3, 1, 4], 4)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(5)
        results.append(module(x)[0].data)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.eval()(x)[0].data, theirs.eval()(x)[0].data, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(results[0], ours(x)[0].data, atol=1e-3)


@pytest.mark.parametrize("train", [False, True])
def test_frozen_input_and_eval_mode(train, device):
    """Weights get nn.LSTM's gradients in eval mode too, which cuDNN refuses, and a frozen input gets none."""
    theirs, ours = twins(device, backend="triton", bidirectional=True)
    x = packed([3, 1, 4], 4)
    for module, rows in ((ours.train(train), x.to(device)), (theirs.train(train), x)):
        module(rows)[0].data.square().sum().backward()
        assert rows.data.grad is None
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-4, atol=1e-5)


def test_frozen_weights_leave_the_inputs_gradient(device):
    theirs, ours = twins(device, backend="triton", bidirectional=True)
    x = packed([3, 1, 4], 4)
    grads = []
    for module, place in ((ours, device), (theirs, "cpu")):
        module.requires_grad_(False)
        rows = x.data.to(place, copy=True).requires_grad_()
        module(x.to(place)._replace(data=rows))[0].data.square().sum().backward()
        grads.append(rows.grad.cpu())
        assert all(p.grad is None for p in module.parameters())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_nothing_is_padded(device, monkeypatch):
    """The loop is given the packed rows themselves."""
    shapes = []
    shipped = triton_lstm.operator.layer.lstm_forward

    def spy(xg, *args, **kwargs):
        shapes.append(xg.shape)
        return shipped(xg, *args, **kwargs)

    monkeypatch.setattr("triton_lstm.operator.layer.lstm_forward", spy)
    module = triton_lstm.LSTM(3, 5, 2, bidirectional=True, backend="triton").to(device)
    module(packed([7, 1, 1, 2], 3, device))
    assert shapes == [(11, 40), (11, 40)]


@pytest.mark.skipif(COMPILED, reason="counts the interpreter's steps")
@pytest.mark.parametrize("passes, per_step", [("forward", 2), ("backward", 3)])
def test_a_batch_tile_stops_at_its_longest_sequence(passes, per_step, monkeypatch):
    plan = Plan("none", True, True, 16, 8, 8, 1, 1, 4)
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: plan)
    module = triton_lstm.LSTM(3, 8, bidirectional=True, backend="triton")
    looked = []
    monkeypatch.setattr(
        f"triton_lstm.kernels.{passes}.rows_of", lambda *args: looked.append(args) or steps.rows_of.fn(*args)
    )
    module(packed([6] + [5] * 15 + [2, 1, 1, 1], 3))[0].data.sum().backward()
    assert len(looked) == 2 * per_step * (6 + 2)


@pytest.mark.skipif(COMPILED, reason=FLOAT64_ON_GPU)
@pytest.mark.parametrize("kwargs", [dict(bidirectional=True), dict(proj_size=2), dict(bidirectional=True, proj_size=2)])
def test_double_backward(kwargs):
    torch.manual_seed(0)
    module = triton_lstm.LSTM(2, 3, **kwargs, backend="triton").double()
    x = packed([1, 3, 2], 2, dtype=torch.float64)
    inputs = [x.data, *states(module, 3), *module.parameters()]
    names = [name for name, _ in module.named_parameters()]

    def outputs(rows, h0, c0, *weights):
        weights = dict(zip(names, weights, strict=True))
        y, h_c = torch.func.functional_call(module, weights, (x._replace(data=rows), (h0, c0)))
        return y.data, *h_c

    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, inputs, fast_mode=True)


@pytest.mark.parametrize("kwargs", [dict(num_layers=2), dict(bidirectional=True, proj_size=2)], ids=str)
def test_transforms(kwargs, device):
    """torch.func's vmap and batched cotangents, of which packed rows cannot be folded into the batch."""
    theirs, ours = twins(device, backend="triton", **kwargs)
    x = packed([1, 3, 2], 4)

    def rows_to_rows(module, place):
        at = x.to(place)
        return lambda rows: module(at._replace(data=rows.to(place)))[0].data.cpu()

    got, expected = rows_to_rows(ours, device), rows_to_rows(theirs, "cpu")
    both = torch.stack([x.data, 2 * x.data])
    jacobian = torch.autograd.functional.jacobian
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.func.vmap(got)(both), torch.stack([*map(expected, both)]), **close)
    torch.testing.assert_close(jacobian(got, x.data, vectorize=True), jacobian(expected, x.data), **close)
    per_sample = torch.func.vmap(torch.func.grad(lambda rows: got(rows).square().sum()))(both)
    each = [jacobian(lambda rows: expected(rows).square().sum(), rows) for rows in both]
    torch.testing.assert_close(per_sample, torch.stack(each), **close)
