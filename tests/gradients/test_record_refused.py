"""Where record_gradients records nothing or refuses to, and its messages."""

import pytest
import torch
from torch import nn

import triton_lstm


def test_never_called(lstm):
    with triton_lstm.record_gradients(lstm) as grads:
        pass
    assert len(grads) == 0 and list(grads._records()) == [] and "'LSTM' was not called" in repr(grads)
    for look in (
        grads.frame,
        grads.summary,
        grads.plot,
        lambda: grads.hidden,
        lambda: grads[0],
        lambda: grads.log(None),
    ):
        with pytest.raises(RuntimeError, match="no gradient was recorded: 'LSTM' was not called inside the block"):
            look()


def test_called_where_gradients_are_off(lstm, x):
    with triton_lstm.record_gradients(lstm) as grads:
        with torch.no_grad():
            lstm(x)
        lstm(x)[0].sum().backward()
    assert [record.call for record in grads] == [0]


def test_backward_never(lstm, x):
    with triton_lstm.record_gradients(lstm) as grads:
        lstm(x)
        lstm(x)
    with pytest.raises(
        RuntimeError, match=r"'LSTM' was called 2 times, but no backward pass reached it inside the block"
    ):
        grads.summary()


def test_a_call_that_no_gradient_reaches_keeps_its_number(lstm, x):
    with triton_lstm.record_gradients(lstm) as grads:
        lstm(x)
        lstm(x)[0].sum().backward()
    assert [record.call for record in grads] == [1]


@pytest.mark.parametrize("arguments, error, text", [
    (dict(reduce="mean"), ValueError, 'reduce must be "norm" or None'),
    (dict(steps=-1), ValueError, "steps must be a non-negative integer"),
    (dict(steps=2.5), ValueError, "steps must be a non-negative integer"),
    (dict(steps=True), ValueError, "steps must be a non-negative integer"),
])  # fmt: skip
def test_wrong_arguments(arguments, error, text, lstm):
    with pytest.raises(error, match=text), triton_lstm.record_gradients(lstm, **arguments):
        pass


def test_models_that_cannot_be_recorded(lstm):
    for model, error, text in [
        (nn.Linear(2, 2), ValueError, "this Linear contains no triton_lstm.LSTM"),
        (nn.Sequential(nn.LSTM(2, 2)), ValueError, r"0 is torch.nn.LSTM: call triton_lstm.convert\(model\) first"),
        (lstm.forward, TypeError, "expects a torch.nn.Module, got method"),
        (torch.compile(nn.Sequential(lstm)), RuntimeError, "the model is compiled"),
    ]:
        with pytest.raises(error, match=text), triton_lstm.record_gradients(model):
            pass
    assert "_recordings" not in vars(lstm)


def test_a_compiled_submodule_cannot_be_recorded(device):
    model = nn.Sequential(triton_lstm.LSTM(3, 4))
    model[0].compile(backend="eager")
    with pytest.raises(RuntimeError, match="and 0 is compiled"), triton_lstm.record_gradients(model):
        pass


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_function_around_the_model(before, fullgraph, lstm, x):
    torch._dynamo.reset()
    function = torch.compile(lambda x: lstm(x)[0].sum(), backend="eager", fullgraph=fullgraph)
    plain = function(x) if before else None
    with (
        triton_lstm.record_gradients(lstm),
        pytest.raises(Exception, match=r"record_gradients .* inside torch.compile"),
    ):
        function(x)
    torch.testing.assert_close(function(x), lstm(x)[0].sum() if plain is None else plain)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev", "jvp"])
def test_transforms_of_torch_func(transform, lstm, x):
    def loss(x):
        return lstm(x)[0].sum()

    calls = {
        "grad": lambda: torch.func.grad(loss)(x),
        "vmap": lambda: torch.func.vmap(loss)(x.expand(2, *x.shape)),
        "jacrev": lambda: torch.func.jacrev(loss)(x),
        "jvp": lambda: torch.func.jvp(loss, (x,), (x,)),
    }
    with triton_lstm.record_gradients(lstm) as grads:
        with pytest.raises(RuntimeError, match=r"not the transforms of torch.func"):
            calls[transform]()
        loss(x).backward()
    assert len(grads) == 1


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_batched_gradients(backend, lstm, x):
    lstm.backend = backend
    x.requires_grad_()
    with triton_lstm.record_gradients(lstm):
        y = lstm(x)[0]
        with pytest.raises(RuntimeError, match="record_gradients does not support is_grads_batched=True"):
            torch.autograd.grad(y, x, torch.randn(2, *y.shape).to(y), is_grads_batched=True)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_complex_numbers(backend):
    lstm = triton_lstm.LSTM(3, 4, backend=backend, dtype=torch.complex64)
    with triton_lstm.record_gradients(lstm), pytest.raises(RuntimeError, match="does not support complex numbers"):
        lstm(torch.zeros(2, 1, 3, dtype=torch.complex64))
