"""torch.onnx.export makes the standard LSTM operator of our module, as it does of nn.LSTM; onnxruntime runs it."""

import collections
import io
import logging

import pytest
import torch
from oracle import flat, twins
from torch.testing import assert_close

import triton_lstm

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
runtime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

T, B, FEATURES, H = 5, 3, 4, 6
CASES = {
    "triton": (dict(num_layers=2, bidirectional=True, dropout=0.5, backend="triton"), False),
    "batch_first": (dict(bidirectional=True, batch_first=True, bias=False), True),
    "torch": (dict(num_layers=2, backend="torch"), True),
}
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")]


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)  # torch.onnx says at every export that torchvision is not there
    yield
    logging.disable(logging.NOTSET)


def pair(**kwargs):
    """nn.LSTM and ours of the same weights, in eval mode, on the CPU."""
    return [module.eval() for module in twins(**kwargs)]


def inputs(module, layout="dense", steps=T, batch=B, hx=True):
    """The input and, if `hx`, the states, in a module's layout."""
    groups = module.num_layers * (2 if module.bidirectional else 1)
    if layout == "unbatched":
        x, states = torch.randn(steps, FEATURES), tuple(torch.randn(groups, H) for _ in range(2))
    else:
        x = torch.randn(batch, steps, FEATURES) if module.batch_first else torch.randn(steps, batch, FEATURES)
        states = tuple(torch.randn(groups, batch, H) for _ in range(2))
    return (x, states) if hx else (x,)


class Model(torch.nn.Module):
    """With the LSTM inside: the older exporter fills in keyword-only arguments by position."""

    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm

    def forward(self, x, hx=None):
        return self.lstm(x, hx)


def exported(module, arguments, dynamo=True, **kwargs):
    """The model of a file as torch.onnx.export writes it."""
    if dynamo:
        return torch.onnx.export(module, arguments, verbose=False, **kwargs).model_proto
    file = io.BytesIO()
    torch.onnx.export(Model(module).eval(), arguments, file, dynamo=False, **kwargs)
    return onnx.load_from_string(file.getvalue())


def operators(model):
    return collections.Counter(node.op_type for node in model.graph.node)


def run(model, arguments):
    """What onnxruntime makes of it: output, h_n and c_n."""
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = [arguments[0], *(arguments[1] if len(arguments) > 1 else ())]
    names = [entry.name for entry in session.get_inputs()]
    found = session.run(None, {name: t.numpy() for name, t in zip(names, given, strict=True)})
    return [torch.from_numpy(array) for array in found]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dynamo", [True, False])
def test_like_nn_lstm(case, dynamo):
    kwargs, hx = CASES[case]
    theirs, ours = pair(**kwargs)
    arguments = inputs(ours, hx=hx)
    model = exported(ours, arguments, dynamo)
    assert operators(model)["LSTM"] == ours.num_layers and {node.domain for node in model.graph.node} == {""}
    found = run(model, arguments)
    assert_close(found, flat(ours(*arguments)))
    assert_close(found, run(exported(theirs, arguments, dynamo), arguments), rtol=0, atol=0)


@pytest.mark.parametrize("dynamo", [True, False])
def test_unbatched(dynamo):
    theirs, ours = pair()
    arguments = inputs(ours, "unbatched")
    found = run(exported(ours, arguments, dynamo), arguments)
    assert_close(found, flat(ours(*arguments)))
    assert_close(found, run(exported(theirs, arguments, dynamo), arguments), rtol=0, atol=0)


@pytest.mark.parametrize("hx, dynamo", [(False, True), (True, False)])
def test_any_number_of_steps_and_rows(hx, dynamo):
    """The newer exporter makes a constant of T; of nn.LSTM's, too, with states or in a stack."""
    _, ours = pair(num_layers=2, bidirectional=True)
    if dynamo:
        shapes = ({1: torch.export.Dim("batch")},)
        kwargs = dict(dynamic_shapes=shapes)
    else:
        axes = {"x": {0: "steps", 1: "batch"}, "h0": {1: "batch"}, "c0": {1: "batch"}}
        names = list(axes) if hx else ["x"]
        kwargs = dict(input_names=names, dynamic_axes={name: axes[name] for name in names})
    model = exported(ours, inputs(ours, hx=hx), dynamo, **kwargs)
    assert operators(model)["LSTM"] == 2
    for steps, batch in ((T, B), (T + 4, B), (2, 1)):
        arguments = inputs(ours, steps=T if dynamo else steps, batch=batch, hx=hx)
        assert_close(run(model, arguments), flat(ours(*arguments)))


def test_by_the_compiler(monkeypatch):
    """What torch.onnx.export tries next, where tracing without the compiler fails."""
    from torch.onnx._internal.exporter import _capture_strategies, _core

    strict = (_capture_strategies.TorchExportStrictStrategy,)
    monkeypatch.setattr(_core._capture_strategies, "CAPTURE_STRATEGIES", strict)
    _, ours = pair(backend="triton")
    arguments = inputs(ours)
    model = exported(ours, arguments)
    assert operators(model)["LSTM"] == 1
    assert_close(run(model, arguments), flat(ours(*arguments)))


def test_states_are_standard_operators_too():
    class States(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = triton_lstm.LSTM(FEATURES, H, backend="triton")

        def forward(self, x):
            y, _, [states] = self.lstm(x, return_states=True)
            return y, states.c, states.o

    torch.manual_seed(0)
    module, x = States().eval(), torch.randn(2, B, FEATURES)
    model = exported(module, (x,))
    assert {node.domain for node in model.graph.node} == {""}
    assert_close(run(model, (x,)), list(module(x)))


@pytest.mark.parametrize("dynamo", [True, False])
def test_a_projection_is_refused(dynamo):
    """nn.LSTM's is either refused or becomes a file that onnxruntime cannot run."""
    _, ours = pair(proj_size=2)
    with pytest.raises(Exception) as refused:  # noqa: PT011
        exported(ours, (torch.randn(T, B, FEATURES),), dynamo)
    errors = [refused.value]
    while errors[-1].__cause__ or errors[-1].__context__:
        errors.append(errors[-1].__cause__ or errors[-1].__context__)
    assert any("ONNX's LSTM operator has no projection" in str(error) for error in errors)


def test_packed_rows_are_refused():
    class Padded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = triton_lstm.LSTM(FEATURES, H)

        def forward(self, x):
            return self.lstm(x, lengths=[3, 1, 2])[0]

    with pytest.raises(Exception, match="cannot be exported"):
        exported(Padded(), (torch.randn(3, B, FEATURES),))


def test_after_an_export_a_call_is_what_it_was():
    _, ours = pair(backend="triton")
    arguments = inputs(ours)
    before = flat(ours(*arguments))
    exported(ours, arguments)
    assert all(map(torch.equal, before, flat(ours(*arguments))))
    program = torch.export.export(ours, arguments)
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    assert any("triton_lstm.layer_forward" in str(node.target) for graph in graphs for node in graph.nodes)
