"""convert: same objects, parameters, results and training as before; what is skipped, and why."""

import copy
import pickle
import sys
import types

import pytest
import torch
from oracle import run
from torch import nn

import triton_lstm
from triton_lstm import convert


class Tagger(nn.Module):
    """Two LSTMs, one of them deep inside and used in two places."""

    def __init__(self, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 4), nn.LSTM(4, 5, 2, **kwargs)])})
        self.decoder = nn.LSTM(5, 5)
        self.tied = self.decoder
        self.head = nn.Linear(5, 2)

    def forward(self, x, hx=None):
        linear, lstm = self.encoder["layers"]
        y, _ = self.decoder(lstm(linear(x))[0])
        y, states = self.tied(y)
        return self.head(y), states


NAMES = ("encoder.layers.1", "decoder")


def example(device):
    return torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1)).to(device)


def close(device):
    return dict(rtol=1e-3, atol=1e-4) if device.type == "cuda" else dict(rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_results_and_gradients_are_unchanged(backend, device):
    model, x = Tagger().to(device), example(device)
    before = run(model, x, None)
    report = convert(model, backend=backend)
    after = run(model, x, None)
    assert report.converted == NAMES and report.skipped == {}
    assert model.decoder.backend == backend
    assert list(after) == list(before)
    for name, tensor in before.items():
        tolerance = dict(rtol=0, atol=0) if backend == "torch" else close(device)
        torch.testing.assert_close(after[name], tensor, **tolerance, msg=name)


def test_the_kernels_run_after_conversion_and_pytorch_after_reverting(device, monkeypatch):
    import triton_lstm.operator.layer

    calls = []
    shipped = triton_lstm.operator.layer.lstm_forward
    monkeypatch.setattr(
        triton_lstm.operator.layer, "lstm_forward", lambda *a, **kw: calls.append(1) or shipped(*a, **kw)
    )
    model, x = Tagger().to(device), example(device)
    counts = []
    for prepare in (lambda: None, lambda: convert(model, backend="triton"), lambda: convert(model, back=True)):
        calls.clear()
        prepare()
        model(x)
        counts.append(len(calls))
    assert counts == [0, 4, 0]  # two layers, and one layer twice


def test_training_continues_unchanged(device):
    """Adam's moments belong to the parameters, which stay the same objects."""

    def train(changes):
        # cuDNN draws numbers of its own for dropout
        model, x = Tagger(dropout=0.5 if device.type == "cpu" else 0.0).to(device), example(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        losses = []
        for step in range(6):
            changes.get(step, lambda model: None)(model)
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = model(x)[0].square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    plain = train({})
    changed = train({2: lambda model: convert(model, backend="triton"), 4: lambda model: convert(model, back=True)})
    assert plain[5] < plain[0] - 1e-3
    assert changed == pytest.approx(plain, rel=1e-4 if device.type == "cpu" else 1e-2)


def test_objects_stay_the_same(device):
    model, x = Tagger().to(device), example(device)
    decoder, before = model.decoder, dict(model.named_parameters())
    keys = list(model.state_dict())
    model.decoder.eval()
    decoder.register_buffer("extra", torch.zeros(1), persistent=False)
    seen = []
    decoder.register_forward_hook(lambda module, args, result: seen.append(type(module)))
    convert(model)
    assert model.decoder is decoder is model.tied and type(decoder) is triton_lstm.LSTM
    assert all(p is before[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert not decoder.training and model.encoder["layers"][1].training
    assert "extra" in dict(decoder.named_buffers())
    model(x)
    assert seen == [triton_lstm.LSTM] * 2


def test_reverting_leaves_no_trace(device):
    model, x = Tagger().to(device), example(device)
    fresh = {name: list(vars(module)) for name, module in model.named_modules()}
    expected, stored = model(x)[0], pickle.dumps(model.decoder)
    convert(model, backend="triton")
    model(x)[0].sum().backward()
    model.zero_grad()
    report = convert(model, back=True)
    assert report.converted == NAMES and report.skipped == {}
    assert type(model.decoder) is type(model.encoder["layers"][1]) is nn.LSTM
    assert {name: list(vars(module)) for name, module in model.named_modules()} == fresh
    assert torch.equal(model(x)[0], expected)
    if device.type == "cpu":
        assert pickle.dumps(model.decoder) == stored


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("when", ["before", "converted", "back"])
def test_pickle_and_deepcopy(copied, when, device):
    model, x = Tagger().to(device), example(device)
    expected = model(x)[0]
    if when != "before":
        convert(model, backend="triton")
    if when == "back":
        convert(model, back=True)
    twin = copied(model)
    assert type(twin.decoder) is (triton_lstm.LSTM if when == "converted" else nn.LSTM)
    assert when != "converted" or twin.decoder.backend == "triton"
    torch.testing.assert_close(twin(x)[0], expected, **close(device))
    convert(twin, back=when == "converted")
    torch.testing.assert_close(twin(x)[0], expected, **close(device))


def test_the_model_itself(device):
    model, x = nn.LSTM(3, 4, batch_first=True, bidirectional=True, proj_size=2).to(device), example(device)
    before = run(model, x, None)
    report = convert(model, backend="triton")
    assert report.converted == ("",) and str(report) == "converted 1 of 1 to triton_lstm.LSTM: (the model itself)"
    assert type(model) is triton_lstm.LSTM
    for name, tensor in run(model, x, None).items():
        torch.testing.assert_close(tensor, before[name], **close(device), msg=name)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weight_norm_by_hooks_is_converted(device):
    model, x = nn.utils.weight_norm(nn.LSTM(3, 5), "weight_hh_l0").to(device), example(device)
    with torch.no_grad():
        model.weight_hh_l0_g.mul_(2)
    before = run(model, x, None)
    assert "dweight_hh_l0_g" in before and before["dweight_hh_l0_g"].any()
    assert convert(model, backend="triton").converted == ("",)
    for name, tensor in run(model, x, None).items():
        torch.testing.assert_close(tensor, before[name], **close(device), msg=name)


@pytest.mark.parametrize("allow_rnn", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_code_is_not_stale(allow_rnn, in_place, device, monkeypatch):
    """torch.compile guards on the class, in a model that is compiled as well as in one that contains it."""
    import triton_lstm.operator.layer

    calls = []
    shipped = triton_lstm.operator.layer.lstm_forward
    monkeypatch.setattr(
        triton_lstm.operator.layer, "lstm_forward", lambda *a, **kw: calls.append(1) or shipped(*a, **kw)
    )
    model, x = Tagger().to(device), example(device)
    if in_place:
        model.compile(backend="eager")
    compiled = model if in_place else torch.compile(model, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=allow_rnn):
        expected = compiled(x)[0]
        convert(compiled, backend="triton")
        torch.testing.assert_close(compiled(x)[0], expected, **close(device))
        assert calls
        calls.clear()
        convert(compiled, back=True)
        assert torch.equal(compiled(x)[0], expected) and not calls


def test_code_that_looks_for_the_class():
    """As docs/tutorials/replace.md says: print shows no difference, and isinstance needs both classes, or the mode."""
    model = Tagger()
    shown = str(model)
    assert "torch.nn.LSTM" not in str(convert(model)) and str(model) == shown
    assert not any(isinstance(m, nn.LSTM) for m in model.modules())
    both = [name for name, m in model.named_modules() if isinstance(m, (nn.LSTM, triton_lstm.LSTM))]
    mode = [name for name, m in model.named_modules() if isinstance(m, nn.RNNBase) and m.mode == "LSTM"]
    assert both == mode == list(NAMES)
    assert str(convert(model, back=True)) == "converted 2 of 2 to torch.nn.LSTM: encoder.layers.1, decoder"


def test_the_class_is_registered_with_opacus(monkeypatch):
    """Its validator and fixer dispatch on the class, so they would report no problem."""
    known = {nn.LSTM: "replace it", nn.GRU: "replace it too"}
    validator = types.SimpleNamespace(VALIDATORS=dict(known), FIXERS=dict(known))
    monkeypatch.setitem(sys.modules, "opacus.validators", types.SimpleNamespace(ModuleValidator=validator))
    convert(nn.Sequential(nn.LSTM(3, 4)))
    assert validator.VALIDATORS == validator.FIXERS == known | {triton_lstm.LSTM: "replace it"}


def test_the_hooks_of_opacus_are_refused():
    """Before the first pass: they would fail in the backward pass, with an unrelated error."""
    wrapper = type("GradSampleModule", (), {"hook": lambda *_: None, "__module__": "opacus.grad_sample.a_module"})
    model = nn.Sequential(triton_lstm.LSTM(3, 4))
    with pytest.raises(RuntimeError, match=r"opacus' GradSampleModule cannot compute .*ModuleValidator\.fix"):
        model[0].register_forward_hook(wrapper().hook)
    assert not model[0]._forward_hooks
    model[0].register_forward_hook(lambda *_: None, prepend=True)
    assert len(model[0]._forward_hooks) == 1


def test_expanded_weights_are_refused_by_name():
    call_for_per_sample_grads = pytest.importorskip("torch.nn.utils._per_sample_grad").call_for_per_sample_grads
    run_sampled = call_for_per_sample_grads(triton_lstm.LSTM(3, 4, batch_first=True), batch_size=2)
    with pytest.raises(RuntimeError, match=r"not of triton_lstm.LSTM: use torch.func's vmap and grad"):
        run_sampled(torch.randn(2, 5, 3))
