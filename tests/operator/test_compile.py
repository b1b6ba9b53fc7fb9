"""torch.compile: one graph with a layer as one operator in it, for any number of steps and rows, equal to eager."""

import itertools
import shutil
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.utils.rnn import pack_padded_sequence

import triton_lstm
from triton_lstm.system.installed import release

FEATURES, H = 7, 6
no_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results(module, inputs, call):
    """Every tensor that a call returns, and every gradient where it has one, for cotangents that differ."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    module.zero_grad()
    torch.manual_seed(2)
    outputs = torch.utils._pytree.tree_leaves(call(module, *leaves))
    asked = [t for t in outputs if t.requires_grad]
    if asked:
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(t.shape, generator=generator).to(t) for t in asked]
        torch.autograd.backward(asked, cotangents)
    return [t.detach() for t in outputs], [t.grad for t in leaves], {n: p.grad for n, p in module.named_parameters()}


def assert_compiled_like_eager(module, inputs, call, backend, fullgraph=True):
    expected = results(module, inputs, call)
    # Eager's random numbers, and its roundings between operators
    options = {"fallback_random": True, "emulate_precision_casts": True} if backend == "inductor" else None
    module.compile(backend=backend, fullgraph=fullgraph, options=options)
    torch.testing.assert_close(results(module, inputs, call), expected, rtol=1e-5, atol=1e-5)


def plain(module, x, *hx):
    return module(x, hx or None)


def frozen(module, x, *hx):
    module.weight_hh_l0.requires_grad_(False)
    return module(x, hx or None)


def without_gradients(module, x, *hx):
    with torch.no_grad():
        return module(x, hx or None)


def in_bf16(module, x, *hx):
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return module(x, hx or None)


def unbatched(module, x, *hx):
    return module(x[:, 0], tuple(state[:, 0] for state in hx) or None)


def all_states(module, x, *hx):
    return module(x, hx or None, return_states=True)


ALL = dict(num_layers=2, bidirectional=True, proj_size=2, batch_first=True, dropout=0.5)
CASES = {
    "plain": (plain, {}, torch.float32),
    "layers, directions, projection, batch first, dropout": (plain, ALL, torch.float32),
    "dropout": (plain, dict(num_layers=2, batch_first=True, dropout=0.5), torch.float32),
    "no bias, recompute": (plain, dict(bias=False, recompute=True, bidirectional=True), torch.float32),
    "unbatched": (unbatched, {}, torch.float32),
    "frozen": (frozen, {}, torch.float32),
    "no gradients": (without_gradients, {}, torch.float32),
    "all states": (all_states, dict(num_layers=2, batch_first=True), torch.float32),
    "autocast": (in_bf16, dict(num_layers=2), torch.float32),
    "bfloat16": (plain, {}, torch.bfloat16),
    "float16": (plain, dict(proj_size=2), torch.float16),
}


def drawn(device, kwargs, dtype=torch.float32, steps=3, batch=2, with_hx=True):
    """A module, and an input and perhaps h0 and c0 for it."""
    torch.manual_seed(0)
    module = triton_lstm.LSTM(FEATURES, H, **kwargs, backend="triton").to(device, dtype)
    shape = (batch, steps, FEATURES) if module.batch_first else (steps, batch, FEATURES)
    groups = module.num_layers * (2 if module.bidirectional else 1)
    states = [(groups, batch, module.proj_size or H), (groups, batch, H)] if with_hx else []
    return module, [torch.randn(s).to(device, dtype) for s in (shape, *states)]


VARIANTS = [
    *itertools.product(CASES, ("eager", "aot_eager"), (False, True)),
    *(pytest.param(name, "inductor", True, marks=no_compiler) for name in ("plain", "autocast", "dropout")),
]


@pytest.mark.parametrize(("name", "backend", "with_hx"), VARIANTS)
def test_compiled_equals_eager(name, backend, with_hx, device):
    if (name, backend) == ("autocast", "inductor") and release(torch.__version__) < (2, 10):
        pytest.skip("PyTorch 2.9's inductor cannot emulate casts of vectors")
    call, kwargs, dtype = CASES[name]
    module, inputs = drawn(device, kwargs, dtype, with_hx=with_hx)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="triton_lstm")
        assert_compiled_like_eager(module, inputs, call, backend)


def test_eval_mode_has_a_backward_pass(device):
    module, inputs = drawn(device, dict(num_layers=2, dropout=0.5))
    assert_compiled_like_eager(module.eval(), inputs, plain, "aot_eager")


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("dynamic", "graphs"), [(True, [1] * 7), (None, [1, 2, 2, 2, 3, 3, 3])])
def test_graphs_for_many_lengths_and_batches(dynamic, graphs, batch_first, device):
    """The sizes are no size of the weights: the compiler takes equal ones for the same one at first."""
    counter = CompileCounter()
    module = triton_lstm.LSTM(FEATURES, 5, proj_size=2, batch_first=batch_first, backend="triton").to(device)
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=dynamic)
    seen = []
    for steps, batch in [(3, 2), (4, 2), (8, 2), (3, 2), (3, 4), (4, 6), (8, 2)]:
        x = torch.randn((batch, steps, FEATURES) if batch_first else (steps, batch, FEATURES), device=device)
        torch.testing.assert_close(compiled(x), module(x))
        seen.append(counter.frame_count)
    assert seen == graphs


@pytest.mark.parametrize("kwargs", [{}, {"bidirectional": True}, {"proj_size": 2}], ids=str)
def test_training_needs_no_more_graphs_for_many_lengths(kwargs, device):
    """The backward pass is traced, too, and no size of the data may become a constant there."""
    module = triton_lstm.LSTM(FEATURES, 5, **kwargs, backend="triton").to(device)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for steps, batch in [(3, 2), (4, 2), (8, 2), (3, 4), (4, 6)]:
            compiled(torch.randn(steps, batch, FEATURES, device=device))[0].sum().backward()


@pytest.mark.parametrize("sizes", [(1, 1), (1, 3), (3, 1)])
def test_one_step_and_one_sequence(sizes, device):
    module, inputs = drawn(device, dict(bidirectional=True), steps=sizes[0], batch=sizes[1])
    assert_compiled_like_eager(module, inputs, plain, "aot_eager")


def test_torch_func_is_right_in_a_compiled_function_and_refused_in_a_whole_graph(device):
    module, (x, *_) = drawn(device, {})
    sample = torch.func.grad(lambda params, x: torch.func.functional_call(module, params, (x,))[0].square().sum())
    each = torch.func.vmap(sample, in_dims=(None, 0))
    params, xs = dict(module.named_parameters()), torch.stack([x, 2 * x])
    for function, inputs in [(sample, (params, x)), (each, (params, xs))]:
        compiled = torch.compile(lambda *inputs, function=function: function(*inputs), backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), function(*inputs))
    whole = torch.compile(lambda params, x: sample(params, x), backend="eager", fullgraph=True)
    reason = r"what torch\.func transforms, outside of a graph"
    if release(torch.__version__) < (2, 10):
        reason = "in an active context manager"  # the last reason of several is all that it tells
    with pytest.raises(torch._dynamo.exc.Unsupported, match=reason):
        whole(params, x)


def test_functional_call_is_compiled(device):
    module, (x, *_) = drawn(device, {})
    doubled = {name: 2 * p for name, p in module.named_parameters()}

    def call(params, x):
        return torch.func.functional_call(module, params, (x,))[0]

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(doubled, x), call(doubled, x))


@pytest.mark.parametrize("how", ["packed", "lengths"])
def test_packed_rows_break_the_graph_and_are_right(how, device):
    module, _ = drawn(device, dict(num_layers=2, bidirectional=True))
    x = torch.randn(4, 3, FEATURES, device=device)

    def call(module, x):
        if how == "lengths":
            return module(2 * x, lengths=[2, 4, 1])
        y, states = module(pack_padded_sequence(2 * x, torch.tensor([2, 4, 1]), enforce_sorted=False))
        return y.data, states

    assert_compiled_like_eager(module, [x], call, "aot_eager", fullgraph=False)
    rows = pack_padded_sequence(x, torch.tensor([2, 4, 1]), enforce_sorted=False)
    whole = torch.compile(module.forward, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="packed rows"):
        whole(rows)


@pytest.mark.parametrize(
    ("backend", "text"),
    [
        (
            "eager",
            "Trying to backward through triton_lstm.layer_backward.default but no autograd formula was registered",
        ),
        ("aot_eager", "torch.compile with aot_autograd does not currently support double backward"),
    ],
)
def test_double_backward_is_refused_not_forgotten(backend, text, device):
    module, (x, *_) = drawn(device, {})
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(compiled(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=text):
        dx.square().sum().backward()


def test_another_backend_makes_another_graph_and_the_variable_is_built_in(device, monkeypatch):
    monkeypatch.delenv("TRITON_LSTM_BACKEND", raising=False)
    module, (x, *_) = drawn(device, {})
    module.backend = None
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    compiled(x)
    monkeypatch.setenv("TRITON_LSTM_BACKEND", "torch")
    compiled(x)
    assert counter.frame_count == 1
    module.backend = "torch"
    compiled(x)
    assert counter.frame_count == 2


def test_backward_under_autocast_keeps_the_forward_dtype(device):
    module = triton_lstm.LSTM(FEATURES, H, backend="triton").to(device)
    module.compile(backend="eager", fullgraph=True)
    y = module(torch.randn(3, 2, FEATURES, device=device))[0].square().sum()
    weights = list(module.parameters())
    expected = torch.autograd.grad(y, weights, retain_graph=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = torch.autograd.grad(y, weights)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=no_compiler)])
@pytest.mark.parametrize("kwargs", [dict(), dict(bidirectional=True, proj_size=2)], ids=str)
def test_gradients_accumulate(backend, kwargs, device):
    """Added up in place over two backward passes: no two gradients may be the same memory."""
    module = triton_lstm.LSTM(FEATURES, H, **kwargs, backend="triton").to(device)
    x = torch.randn(3, 2, FEATURES, device=device)
    module.compile(backend=backend, fullgraph=True)
    module(x)[0].square().sum().backward()
    once = [p.grad.clone() for p in module.parameters()]
    module(x)[0].square().sum().backward()
    for p, first in zip(module.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * first)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=no_compiler)])
@pytest.mark.parametrize("kwargs", [dict(batch_first=True), dict(batch_first=True, recompute=True), dict()], ids=str)
def test_results_changed_in_place_leave_the_gradients_right(backend, kwargs, device):
    """Outputs that are views of what is saved would be changed behind a compiled backward's back."""
    module = triton_lstm.LSTM(FEATURES, H, **kwargs, backend="triton").to(device)
    weights = list(module.parameters())
    x = torch.randn(*((2, 3) if kwargs else (3,)), FEATURES, device=device)  # unbatched without batch_first
    expected = torch.autograd.grad(torch.relu(module(x)[0]).sum(), weights)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    y, _, [states] = compiled(x, return_states=True)
    for state in states:
        state.mul_(3)
    got = torch.autograd.grad(torch.relu_(y).sum(), weights)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_forward_of_ones_own_runs_once(device):
    """Packed rows leave the graph below it."""

    class Doubling(triton_lstm.LSTM):
        def forward(self, input, hx=None, **kwargs):
            return super().forward(input * 2, hx, **kwargs)

    module, x = Doubling(FEATURES, H, backend="triton").to(device), torch.randn(3, 2, FEATURES, device=device)
    expected = module(x, lengths=[3, 2])[0]
    torch.testing.assert_close(torch.compile(module, backend="eager")(x, lengths=[3, 2])[0], expected)


@pytest.mark.parametrize("strict", [False, True])
def test_lengths_cannot_be_exported(strict, device):
    class Padded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = triton_lstm.LSTM(FEATURES, H, backend="triton").to(device)

        def forward(self, x):
            return self.lstm(x, lengths=[3, 2])[0]

    with pytest.raises(Exception, match="cannot be exported" if not strict else "outside of a graph"):
        torch.export.export(Padded(), (torch.randn(3, 2, FEATURES, device=device),), strict=strict)


@pytest.mark.parametrize("training", [False, True])
def test_only_what_a_backward_pass_reads_is_copied(training, device):
    """See test_results_changed_in_place_leave_the_gradients_right."""
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    module = triton_lstm.LSTM(FEATURES, H, batch_first=True, backend="triton").to(device)
    with torch.set_grad_enabled(training):
        torch.compile(module, backend=backend, fullgraph=True)(torch.randn(2, 3, FEATURES, device=device))
    assert any("layer_forward" in target for target in targets)
    assert any("fresh" in target for target in targets) == training
