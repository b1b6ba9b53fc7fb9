"""What convert skips, what it reports, and what it refuses."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import triton_lstm
from triton_lstm import convert


class Own(nn.LSTM):
    """A user's subclass."""


class Ours(triton_lstm.LSTM):
    """A subclass of the other class."""


def replaced():
    module = nn.LSTM(3, 4)
    module.forward = lambda x: x
    return module


LEFT = {
    "subclass": (lambda: Own(3, 4), r"a subclass, Own, which may behave differently"),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),
        "parametrized: convert first, then parametrize",
    ),
    "traced": (lambda: torch.jit.trace(nn.LSTM(3, 4), torch.zeros(2, 1, 3)), "TorchScript modules cannot be changed"),
    "quantizable": (lambda: torch.ao.nn.quantizable.LSTM(3, 4), "quantized, or prepared for quantization"),
    "forward replaced": (replaced, "its forward method was replaced"),
    "converted": (lambda: triton_lstm.LSTM(3, 4), "already a triton_lstm.LSTM"),
    "subclass of ours": (lambda: Ours(3, 4), "already a triton_lstm.LSTM"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("case", LEFT)
def test_skipped_with_a_reason(case):
    make, reason = LEFT[case]
    model = nn.ModuleDict({"plain": nn.LSTM(3, 4), "other": make(), "linear": nn.Linear(3, 4)})
    kind, attributes = type(model["other"]), list(vars(model["other"]))
    report = convert(model, backend="torch")
    assert report.converted == ("plain",) and list(report.skipped) == ["other"]
    assert report.skipped["other"].startswith(reason)
    assert str(report) == f"converted 1 of 2 to triton_lstm.LSTM: plain\nskipped: other ({report.skipped['other']})"
    assert type(model["other"]) is kind and list(vars(model["other"])) == attributes


def test_back_leaves_subclasses_and_pytorchs_own():
    model = nn.ModuleList([triton_lstm.LSTM(3, 4), Ours(3, 4), nn.LSTM(3, 4), Own(3, 4)])
    parametrized = parametrizations.weight_norm(triton_lstm.LSTM(3, 4), "weight_hh_l0")
    model.append(parametrized)
    report = convert(model, back=True)
    assert report.converted == ("0",)
    assert [reason.split(":")[0].split(",")[0] for reason in report.skipped.values()] == [
        "a subclass",
        "already an nn.LSTM",
        "already an nn.LSTM",
        "parametrized",
    ]
    assert [type(module) for module in model[:4]] == [nn.LSTM, Ours, nn.LSTM, Own]


def test_parametrizing_after_conversion_works(device):
    model = nn.LSTM(3, 4).to(device)
    convert(model, backend="triton")
    x = torch.randn(2, 1, 3, device=device)
    parametrizations.weight_norm(model, "weight_hh_l0")
    twin = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0").to(device)
    twin.load_state_dict(model.state_dict())
    assert isinstance(model, triton_lstm.LSTM)
    torch.testing.assert_close(model(x)[0], twin(x)[0], rtol=1e-4, atol=1e-5)


def test_converting_twice():
    model = nn.Sequential(nn.LSTM(3, 4))
    convert(model, backend="triton")
    attributes = dict(vars(model[0]))
    again = convert(model, backend="torch")
    assert vars(model[0]) == attributes and model[0].backend == "triton"
    assert str(again) == "converted 0 of 1\nskipped: 0 (already a triton_lstm.LSTM)"


@pytest.mark.parametrize("back", [False, True])
def test_a_model_without_any(back):
    report = convert(nn.Sequential(nn.Linear(3, 4), nn.GRU(3, 4)), back=back)
    assert report.converted == () and report.skipped == {}
    assert str(report) == "nothing to convert: the model contains no LSTM"


def test_every_option_is_an_argument_with_that_default():
    module = triton_lstm.LSTM(3, 4)
    own = {name: value for name, value in vars(module).items() if name not in vars(nn.LSTM(3, 4))}
    assert own == {name: getattr(triton_lstm.LSTM, name) for name in triton_lstm.LSTM.OPTIONS}


@pytest.mark.parametrize(
    "error, text, call",
    [
        (TypeError, "convert expects an nn.Module, got OrderedDict", lambda m: convert(m.state_dict())),
        (TypeError, "convert expects an nn.Module, got type", lambda m: convert(nn.LSTM)),
        (
            TypeError,
            "triton_lstm.LSTM has no option 'bakend'. Available: backend",
            lambda m: convert(m, bakend="torch"),
        ),
        (TypeError, "no option 'num_layers'", lambda m: convert(m, num_layers=2)),
        (TypeError, "nn.LSTM does not have these options: backend", lambda m: convert(m, back=True, backend="torch")),
        (ValueError, 'backend must be "auto", "triton" or "torch"', lambda m: convert(m, backend="cuda")),
    ],
)
def test_wrong_arguments_change_nothing(error, text, call):
    model = nn.LSTM(3, 4)
    attributes = dict(vars(model))
    with pytest.raises(error, match=text):
        call(model)
    assert type(model) is nn.LSTM and vars(model) == attributes


def test_conversion_uses_no_random_numbers():
    model = nn.LSTM(3, 4)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    convert(model)
    assert torch.equal(torch.rand(3), expected)
