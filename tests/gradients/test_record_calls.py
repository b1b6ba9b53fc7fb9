"""record_gradients around models: several modules, calls and passes, and wrappers."""

import warnings

import pytest
import torch
from oracle import data_of
from recorded import B, T
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import triton_lstm
from triton_lstm.gradients.results import Gradients


class Model(nn.Module):
    """Two LSTMs, the second called twice, a third never."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = triton_lstm.LSTM(3, 4, 2)
        self.parts = nn.ModuleDict({"decoder": triton_lstm.LSTM(4, 5, bidirectional=True)})
        self.spare = triton_lstm.LSTM(3, 4)

    def forward(self, x):
        y = self.encoder(x)[0]
        decode = self.parts["decoder"]
        return decode(y)[0].sum() + 2 * decode(y.flip(0)[:2])[0].sum()


def place(record):
    return record.module, record.call, record.backward, record.layer, record.direction


def test_modules_calls_layers_and_directions(device, x):
    model = Model().to(device)
    with triton_lstm.record_gradients(model) as grads:
        model(x).backward()
    both = ("forward", "reverse")
    assert [place(record) for record in grads] == [
        ("encoder", 0, 0, 0, "forward"),
        ("encoder", 0, 0, 1, "forward"),
        *(("parts.decoder", call, 0, 0, direction) for call in (0, 1) for direction in both),
    ]
    assert len(grads) == 6 and [r.steps for r in grads] == [T, T, T, T, 2, 2]
    second = grads.select(module="parts.decoder", call=-1)
    assert [r.direction for r in second] == list(both) and (second[0].output == 2).all()
    assert second.select(direction="reverse").hidden.shape == (2, B, 5)
    inputs = [grads.select(module="parts.decoder", call=call)[0].input for call in (0, 1)]
    top = grads.select(module="encoder", layer=-1)
    flipped = nn.functional.pad(inputs[1], (0, 0, 0, 0, 0, T - 2)).flip(0)
    torch.testing.assert_close(top.output, inputs[0] + flipped)
    torch.testing.assert_close(grads.select(module="encoder", layer=0).output, top.input)
    assert "nothing was recorded for 'spare'" in grads.summary()
    shown = repr(second[0]).splitlines()
    assert shown[0].endswith(": 2 steps") and any(f"(2, {B}, 5) float32" in line for line in shown)
    assert repr(second[0].gates) == f"Gates: i, f, g, o (2, {B}, 5) each, all (2, {B}, 20)"
    assert "6" in repr(grads) and "'parts.decoder', call 1, layer 0, reverse" in repr(grads)


def test_what_there_is_none_of(device, x):
    model = Model().to(device)
    with triton_lstm.record_gradients(model) as grads:
        model(x).backward()
    with pytest.raises(LookupError, match="nothing was recorded for layer=7; available: 0, 1"):
        grads.select(layer=7)
    with pytest.raises(
        LookupError, match=r"nothing was recorded for module='spare'; available: 'encoder', 'parts.decoder'"
    ):
        grads.select(module="spare")
    with pytest.raises(
        RuntimeError, match=r"there are 6 records, which differ in module, call, layer, direction: choose"
    ):
        _ = grads.hidden
    with pytest.raises(
        RuntimeError, match=r"there are 2 records, which differ in layer.*grads.select\(layer=0\).input"
    ):
        _ = grads.select(module="encoder").input


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("reduce", [None, "norm"])
def test_backward_twice_is_two_records(backend, proj_size, reduce, device, x):
    lstm = triton_lstm.LSTM(3, 4, proj_size=proj_size, backend=backend).to(device)
    with triton_lstm.record_gradients(lstm, reduce=reduce) as grads:
        y, (_, c_n) = lstm(x)
        y.sum().backward(retain_graph=True)
        c_n.sum().backward()
    assert [record.backward for record in grads] == [0, 1]
    norms = [record.statistics()["output"].norm for record in grads]
    assert norms[0].all() and not norms[1].any(), "the second loss does not use the output"
    with pytest.raises(
        RuntimeError, match=r"there are 2 records, which differ in backward: .*grads.select\(backward=0\).cell"
    ):
        _ = grads.cell
    assert set(grads.frame()["backward"]) == {0, 1}


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_pass_that_stopped_at_the_output_leaves_nothing_behind(backend, device, x):
    """With a projection the output's gradient is recorded before the time loop's."""
    lstm = triton_lstm.LSTM(3, 4, proj_size=2, backend=backend).to(device)
    with triton_lstm.record_gradients(lstm) as grads:
        y, (_, c_n) = lstm(x)
        torch.autograd.grad(y.sum(), y, retain_graph=True)
        c_n.sum().backward()
    assert len(grads) == 1 and not grads.output.any() and grads.cell.any()


def test_nested_recordings_record_the_same(device, x):
    model = Model().to(device)
    with triton_lstm.record_gradients(model) as outer:
        with triton_lstm.record_gradients(model.encoder, reduce="norm") as inner:
            model(x).backward()
        model(x).backward()
    assert len(outer) == 12 and len(inner) == 2 and inner[0].module == "LSTM"
    for a, b in zip(outer.select(module="encoder", call=0), inner, strict=True):
        assert a.every_element and not b.every_element
        for name, statistics in a.statistics().items():
            torch.testing.assert_close(b.statistics()[name], statistics)
    assert all("_recordings" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_recordings_of_a_projection_beside_each_other(backend, device, x):
    """What h_n is asked for is part of both."""
    module = triton_lstm.LSTM(x.shape[-1], 4, proj_size=2, backend=backend).to(device)
    with triton_lstm.record_gradients(module) as a, triton_lstm.record_gradients(module) as b:
        y, (h_n, _) = module(x)
        (y.square().sum() + h_n.sin().sum()).backward()
    for name, statistics in a[0].statistics().items():
        torch.testing.assert_close(b[0].statistics()[name], statistics)
    torch.testing.assert_close(a.hidden, b.hidden)
    assert a.hidden[-1].ne(a.output[-1]).any()


def test_an_exception_inside_the_block(lstm, x):
    kept = []

    def fails():
        with triton_lstm.record_gradients(lstm) as grads:
            lstm(x)[0].sum().backward()
            kept.extend([grads, lstm(x)[0]])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    grads, y = kept
    assert "_recordings" not in vars(lstm) and grads.hidden.any()
    y.sum().backward()
    assert len(grads) == 1


def test_steps_keeps_longer_calls_as_norms(lstm, device):
    with triton_lstm.record_gradients(lstm, steps=4) as grads:
        for steps in (4, 5):
            lstm(torch.randn(steps, B, 3, device=device))[0].sum().backward()
        packed = pack_padded_sequence(torch.randn(5, B, 3, device=device), [5, 2])
        lstm(packed)[0].data.sum().backward()
    assert [record.every_element for record in grads] == [True, False, False]
    with pytest.raises(
        RuntimeError, match=r"only norms were recorded for 'LSTM', call 1, layer 0, forward \(5 steps\)"
    ):
        _ = grads[1].gates
    assert grads.frame().groupby("call")["step"].max().tolist() == [3, 4, 4]
    assert "norms" in repr(grads[1])


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_is_one_call(backend, use_reentrant, device, x):
    model = nn.ModuleList([triton_lstm.LSTM(3, 4, backend=backend), triton_lstm.LSTM(4, 4, backend=backend)]).to(device)

    def stack(x):
        for module in model:
            x = module(x)[0]
        return x

    x.requires_grad_()
    with triton_lstm.record_gradients(model) as grads:
        for _ in range(2):
            checkpoint(stack, x, use_reentrant=use_reentrant).sum().backward()
    with triton_lstm.record_gradients(model) as plain:
        stack(x).sum().backward()
    assert [place(r)[:2] for r in grads] == [("0", 0), ("0", 1), ("1", 0), ("1", 1)]
    for module in ("0", "1"):
        for call in (0, 1):
            got, right = grads.select(module=module, call=call)[0], plain.select(module=module)[0]
            assert torch.equal(got.hidden, right.hidden) and torch.equal(got.input, right.input)


def test_a_gradient_penalty(device, precise, x):
    """The first pass of a double backward is recorded, not the derivative of it; what is recorded has no history."""
    dtype, _ = precise
    lstm = triton_lstm.LSTM(3, 4, backend="triton").to(device, dtype)
    x = x.to(dtype).requires_grad_()

    def gradients():
        lstm.zero_grad()
        [gradient] = torch.autograd.grad(lstm(x)[0].sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return gradient.detach(), [p.grad for p in lstm.parameters()]

    plain = gradients()
    with triton_lstm.record_gradients(lstm) as grads:
        recorded = gradients()
    assert torch.equal(plain[0], recorded[0]) and all(map(torch.equal, plain[1], recorded[1]))
    assert len(grads) == 1 and torch.equal(grads.input, plain[0])
    assert not any(t.requires_grad for t in (grads.input, grads.output, grads.hidden, grads.cell, grads.gates.all))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype, lstm, x):
    with triton_lstm.record_gradients(lstm) as grads, torch.autocast(x.device.type, dtype=dtype):
        lstm(x)[0].float().square().sum().backward()
    assert {grads.input.dtype, grads.output.dtype, grads.gates.all.dtype, grads.h0.dtype, grads.c0.dtype} == {dtype}
    assert grads.hidden.dtype == grads.cell.dtype == torch.float32


def test_states_that_the_loss_uses(device, precise, x):
    """c and the gates have gradients of their own: the kernels' record is that of PyTorch's path."""
    dtype, close = precise
    found = {}
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        lstm = triton_lstm.LSTM(3, 4, bidirectional=True, proj_size=2, backend=backend).to(device, dtype)
        with triton_lstm.record_gradients(lstm) as grads:
            y, _, [states] = lstm(x.to(dtype), return_states=True)
            sum(t.square().sum() for t in (y, *states)).backward()
        found[backend] = [t for r in grads for t in (r.input, r.output, r.hidden, r.cell, r.gates.all, r.h0, r.c0)]
    torch.testing.assert_close(found["triton"], found["torch"], **close)


def test_no_sequences_at_all(device):
    lstm = triton_lstm.LSTM(3, 4, backend="triton").to(device)
    with triton_lstm.record_gradients(lstm) as grads:
        lstm(torch.randn(T, 0, 3, device=device))[0].sum().backward()
    assert grads.hidden.shape == (T, 0, 4) and grads.h0.shape == (0, 4)
    assert "zero everywhere" in grads.summary() and len(grads.frame()) == 8 * T + 2


def test_a_stack_that_is_frozen_below(device, x):
    lstm = triton_lstm.LSTM(3, 4, 2, backend="triton").to(device)
    for name, parameter in lstm.named_parameters():
        parameter.requires_grad_(name.endswith("l1"))
    with triton_lstm.record_gradients(lstm) as grads:
        lstm(x)[0].sum().backward()
    assert [record.layer for record in grads] == [1] and isinstance(grads, Gradients)
    assert grads.input.any()


def test_data_parallel_replicas_are_recorded(device, x):
    """DataParallel copies a module's attributes into its replicas, which run in threads of their own."""
    lstm = triton_lstm.LSTM(3, 4, backend="triton").to(device)
    with triton_lstm.record_gradients(lstm) as grads, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        replica = lstm._replicate_for_data_parallel()
        for name, parameter in lstm.named_parameters():
            setattr(replica, name, parameter * 1)
        replica(x)[0].sum().backward()
    assert len(grads) == 1


def test_norms_of_a_projection_in_16_bits(device, x):
    """The total of h is accumulated in float32."""
    lstm = triton_lstm.LSTM(3, 4, proj_size=2, backend="triton").to(device, torch.bfloat16)
    with triton_lstm.record_gradients(lstm) as whole, triton_lstm.record_gradients(lstm, reduce="norm") as norms:
        lstm(x.bfloat16())[0].square().sum().backward()
    with triton_lstm.record_gradients(lstm, reduce="norm") as alone:
        lstm(x.bfloat16())[0].square().sum().backward()
    assert whole.hidden.dtype == torch.float32
    for name, statistics in whole[0].statistics().items():
        torch.testing.assert_close(norms[0].statistics()[name], statistics)
        torch.testing.assert_close(alone[0].statistics()[name], statistics, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["packed", "lengths"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reduce", [None, "norm"])
def test_sequences_of_different_lengths_in_16_bits(backend, dtype, layout, autocast, reduce, device):
    """A projection, both directions: what is recorded is that of float32, up to 16 bits."""
    found = {}
    for kind in (torch.float32, dtype):
        torch.manual_seed(0)
        lstm = triton_lstm.LSTM(3, 4, bidirectional=True, proj_size=2, backend=backend).to(device)
        x, lengths = torch.randn(5, 3, 3, device=device), [2, 5, 3]
        if not autocast:
            lstm, x = lstm.to(kind), x.to(kind)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        with triton_lstm.record_gradients(lstm, reduce=reduce) as grads:
            with torch.autocast(device.type, dtype, enabled=autocast and kind == dtype):
                y, (h_n, _) = lstm(packed) if layout == "packed" else lstm(x, lengths=lengths)
            (data_of(y).float().square().sum() + h_n.float().sum()).backward()
        assert [record.direction for record in grads] == ["forward", "reverse"]
        found[kind] = [record.statistics() for record in grads]
        if reduce is None:
            assert {data_of(record.hidden).dtype for record in grads} == {torch.float32}
            found[kind] = [[data_of(r.hidden), data_of(r.gates.all), data_of(r.input), r.h0] for r in grads]
            found[kind] = [[t.float() for t in of] for of in found[kind]]
    torch.testing.assert_close(found[dtype], found[torch.float32], rtol=2**-5, atol=2**-5)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_total_of_h_may_be_larger_than_float16(backend, device):
    """It is float32, and so is every term of it."""
    lstm = triton_lstm.LSTM(3, 4, proj_size=2, backend=backend).to(device, torch.float16)
    with torch.no_grad():
        for name, weight in lstm.named_parameters():
            weight.zero_() if "weight_hh" not in name else weight.fill_(2.0**15)
        lstm.weight_hr_l0[0].fill_(1.0)
    with triton_lstm.record_gradients(lstm) as grads:
        lstm(torch.zeros(2, 1, 3, device=device, dtype=torch.float16))[1][1].sum().backward(torch.tensor(64.0))
    assert grads.hidden.isfinite().all() and grads.hidden.max() > torch.finfo(torch.float16).max


@pytest.mark.parametrize("kwargs", [dict(proj_size=2, backend="triton"), dict(backend="torch")], ids=str)
@pytest.mark.parametrize("states", [False, True])
def test_an_output_modified_in_place(kwargs, states, device, x):
    lstm = triton_lstm.LSTM(3, 4, **kwargs).to(device)
    with triton_lstm.record_gradients(lstm) as grads:
        y = lstm(x, return_states=states)[0]
        y.mul_(2)
        y.sum().backward()
    assert (grads.output == 2).all() and torch.equal(grads.output[-1].float(), grads.hidden[-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuDNN saves the biases, so the backward pass itself fails")
def test_a_weight_modified_in_place_before_the_backward_pass(device, x):
    """PyTorch's LSTM saves no bias and is not affected; the reference would use the modified one."""
    lstm = triton_lstm.LSTM(3, 4, backend="torch").to(device, torch.float64)
    with triton_lstm.record_gradients(lstm) as grads:
        loss = lstm(x.double())[0].sum()
        with torch.no_grad():
            lstm.bias_ih_l0.add_(3)
        with pytest.warns(UserWarning, match="modified in place between its call and the backward pass"):
            loss.backward()
    assert len(grads) == 0 and lstm.bias_ih_l0.grad.any()
