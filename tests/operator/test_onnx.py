"""torch.onnx.export makes the standard LSTM operator of our module, as it does of nn.LSTM; onnxruntime runs it."""

import collections
import io
import logging

import pytest
import torch
from oracle import flat, twins
from torch.testing import assert_close

import triton_lstm
from triton_lstm.system.installed import release

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
runtime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

T, B, FEATURES, H = 5, 3, 4, 6
ANY = torch.export.Dim.DYNAMIC
SIZES = [(T, B), (T + 4, B), (2, 1)]  # steps and rows that a file is run with
CASES = {
    "triton": (dict(num_layers=2, bidirectional=True, dropout=0.5, backend="triton"), False),
    "torch": (dict(bidirectional=True, batch_first=True, bias=False, backend="torch"), True),
}
STRICT = pytest.mark.skipif(
    release(torch.__version__) < (2, 10), reason="PyTorch 2.9 exports no check of states strictly"
)
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
        states = tuple(torch.randn(groups, batch, n) for n in (module.proj_size or H, H))
    return (x, states) if hx else (x,)


def any_sizes(arguments):
    """dynamic_shapes for batched ones: any number of steps and rows."""
    return ({0: ANY, 1: ANY}, ({1: ANY}, {1: ANY}))[: len(arguments)]


def exported(model, arguments=None, dynamo=True, **kwargs):
    """The model of a file as torch.onnx.export writes it."""
    if dynamo:
        return torch.onnx.export(model, arguments, verbose=False, **kwargs).model_proto
    file = io.BytesIO()
    torch.onnx.export(model, arguments, file, dynamo=False, **kwargs)
    return onnx.load_from_string(file.getvalue())


def operators(model):
    """How often each is there; none but ONNX's own."""
    assert {node.domain for node in model.graph.node} == {""}
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
def test_any_number_of_steps_and_rows(case, dynamo):
    """What the newer exporter makes of nn.LSTM runs with the number of steps it was exported with alone."""
    kwargs, hx = CASES[case]
    theirs, ours = pair(**kwargs)
    arguments = inputs(ours, hx=hx)
    if dynamo:
        model = exported(ours, arguments, dynamic_shapes=any_sizes(arguments))
    else:
        axes = {"x": {0: "a", 1: "b"}} | ({"h0": {1: "rows"}, "c0": {1: "rows"}} if hx else {})
        model = exported(ours, arguments, dynamo, input_names=list(axes), dynamic_axes=axes)
    assert operators(model)["LSTM"] == ours.num_layers
    for steps, batch in SIZES:
        arguments = inputs(ours, steps=steps, batch=batch, hx=hx)
        assert_close(run(model, arguments), flat(theirs(*arguments)))


@pytest.mark.parametrize("dynamo", [True, False])
def test_unbatched(dynamo):
    theirs, ours = pair()
    arguments = inputs(ours, "unbatched")
    shapes = dict(dynamic_shapes=({0: ANY}, (None, None))) if dynamo else {}
    model = exported(ours, arguments, dynamo, **shapes)
    for steps in (T, T + 4) if dynamo else (T,):
        arguments = inputs(ours, "unbatched", steps)
        assert_close(run(model, arguments), flat(theirs(*arguments)))


def test_a_subclass_with_arguments_of_its_own_by_tracing():
    class Negated(triton_lstm.LSTM):
        def forward(self, input, hx=None, negate=True):
            return super().forward(-input if negate else input, hx)

    torch.manual_seed(0)
    ours = Negated(FEATURES, H).eval()
    arguments = inputs(ours)
    assert_close(run(exported(ours, arguments, dynamo=False), arguments), flat(ours(*arguments)))


@STRICT
def test_a_program_exported_before():
    _, ours = pair(backend="torch")
    arguments = inputs(ours)
    program = torch.export.export(ours, arguments, dynamic_shapes=any_sizes(arguments), strict=True)
    model = exported(program)
    assert operators(model)["LSTM"] == 1
    for steps, batch in SIZES:
        arguments = inputs(ours, steps=steps, batch=batch)
        assert_close(run(model, arguments), flat(ours(*arguments)))


@STRICT
def test_by_the_compiler(monkeypatch, interpreter):
    """What torch.onnx.export tries next, where tracing without the compiler fails; later calls are what they were."""
    from torch.onnx._internal.exporter import _capture_strategies, _core

    strict = (_capture_strategies.TorchExportStrictStrategy,)
    monkeypatch.setattr(_core._capture_strategies, "CAPTURE_STRATEGIES", strict)
    _, ours = pair(backend="triton")
    arguments = inputs(ours)
    before = flat(ours(*arguments))
    model = exported(ours, arguments)
    assert operators(model)["LSTM"] == 1
    assert_close(run(model, arguments), before)
    assert all(map(torch.equal, before, flat(ours(*arguments))))


def test_where_no_kernel_can_run(monkeypatch):
    """A model that is to run on a GPU is exported on the CPU."""
    theirs, ours = pair(backend="triton")
    arguments = inputs(ours)
    monkeypatch.setattr("triton_lstm.dispatch.no_kernel_for", lambda *_: "there is no GPU")
    model = exported(ours, arguments)
    assert operators(model)["LSTM"] == 1
    assert_close(run(model, arguments), flat(theirs(*arguments)))


def test_converted_inside_of_a_model_and_exported_before():
    class Tagger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(10, FEATURES), torch.nn.Linear(2 * H, 3)
            self.lstm = torch.nn.LSTM(FEATURES, H, batch_first=True, bidirectional=True)

        def forward(self, tokens):
            return self.head(self.lstm(self.embedding(tokens))[0])

    torch.manual_seed(0)
    tagger = Tagger().eval()
    draws = [torch.randint(10, size) for size in [(B, T), (2, T + 3)]]
    expected = [tagger(tokens) for tokens in draws]
    triton_lstm.convert(tagger)
    model = exported(torch.export.export(tagger, (draws[0],), dynamic_shapes=({0: ANY, 1: ANY},)))
    assert operators(model)["LSTM"] == 1
    for tokens, logits in zip(draws, expected, strict=True):
        assert_close(run(model, (tokens,)), [logits])


def test_in_training_mode_it_has_its_dropout():
    _, ours = (module.train() for module in twins(num_layers=2, dropout=0.5))
    found = operators(exported(ours, inputs(ours, hx=False)))
    assert (found["LSTM"], found["Dropout"]) == (2, 1)  # as of nn.LSTM


def test_float16():
    _, ours = pair()
    x = torch.randn(T, B, FEATURES, dtype=torch.float16)
    found = run(exported(ours.half(), (x,)), (x,))
    assert_close(found, flat(ours(x)), rtol=0, atol=4e-3)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_every_step_of_the_states(backend):
    class States(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = triton_lstm.LSTM(FEATURES, H, bidirectional=True, backend=backend)

        def forward(self, x):
            _, _, [states] = self.lstm(x, return_states=True)
            return states.c, states.f

    torch.manual_seed(0)
    module, x = States().eval(), torch.randn(T, B, FEATURES)
    model = exported(module, (x,), dynamic_shapes=any_sizes((x,)))
    assert operators(model)["LSTM"] == 2  # one of them for c
    module.lstm.backend = "torch"  # which runs everywhere
    for steps, batch in SIZES:
        x = torch.randn(steps, batch, FEATURES)
        assert_close(run(model, (x,)), list(module(x)))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_with_a_projection(backend):
    """The file that nn.LSTM becomes does not run."""
    theirs, ours = pair(proj_size=2, bidirectional=True, backend=backend)
    arguments = inputs(ours)
    model = exported(ours, arguments, dynamic_shapes=any_sizes(arguments))
    assert operators(model)["LSTM"] == 1
    for steps, batch in SIZES:
        arguments = inputs(ours, steps=steps, batch=batch)
        assert_close(run(model, arguments), flat(theirs(*arguments)))


def test_a_projection_is_refused_by_tracing():
    """As nn.LSTM's is."""
    theirs, ours = pair(proj_size=2)
    arguments = inputs(ours, hx=False)
    with pytest.raises(RuntimeError, match="LSTMs with projections"):
        exported(theirs, arguments, dynamo=False)
    with pytest.raises(RuntimeError, match=r"ONNX's LSTM operator has no projection.* leave dynamo out"):
        exported(ours, arguments, dynamo=False)


def test_packed_rows_are_refused():
    class Padded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = triton_lstm.LSTM(FEATURES, H)

        def forward(self, x):
            return self.lstm(x, lengths=[3, 1, 2])[0]

    with pytest.raises(Exception, match="cannot be exported"):
        exported(Padded(), (torch.randn(3, B, FEATURES),))


@pytest.mark.parametrize("backend, name", [("triton", "layer_forward"), ("torch", "torch_layer")])
def test_no_other_export_takes_an_operator_apart(backend, name, monkeypatch, request):
    if backend == "triton":
        request.getfixturevalue("interpreter")
    for module in ("triton_lstm.operator.library", "triton_lstm.operator.torch_library"):
        monkeypatch.delattr(f"{module}.layer_by_onnx")
    _, ours = pair(backend=backend)
    arguments = inputs(ours)
    program = torch.export.export(ours, arguments, dynamic_shapes=any_sizes(arguments)).run_decompositions()
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    assert any(f"triton_lstm.{name}" in str(node.target) for graph in graphs for node in graph.nodes)
