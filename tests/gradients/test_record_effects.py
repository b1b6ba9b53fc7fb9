"""What recording must not do: change a result, cost anything when it is off, keep anything alive, or start a launch."""

import copy
import gc
import io
import weakref

import pytest
import torch
from compiled import COMPILED
from oracle import data_of, state_shapes
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import triton_lstm
from triton_lstm.planning.plan import Plan

T, B, FEATURES, H = 5, 3, 4, 6
KINDS = {
    "one layer": dict(),
    "layers, both directions": dict(num_layers=2, bidirectional=True),
    "dropout": dict(num_layers=3, dropout=0.4),
    "projection": dict(num_layers=2, proj_size=3, bidirectional=True),
    "recompute": dict(recompute=True, batch_first=True),
    "no bias": dict(bias=False, num_layers=2),
}
BACKENDS = ["triton", "torch"]


def module_of(device, **kwargs):
    torch.manual_seed(0)
    return triton_lstm.LSTM(FEATURES, H, **kwargs).to(device)


def step(module, packed=False, seed=1, segments=False):
    """A training step's results and gradients; the loss uses output, h_n and c_n."""
    generator = torch.Generator().manual_seed(seed)
    device = next(module.parameters()).device
    x = torch.randn(T, B, FEATURES, generator=generator).to(device).requires_grad_()
    hx = [torch.randn(s, generator=generator).to(device).requires_grad_() for s in state_shapes(module, B)]
    given = x.transpose(0, 1) if module.batch_first else x
    given = pack_padded_sequence(x, [2, 5, 3], enforce_sorted=False) if packed else given
    resets = (torch.rand(data_of(given).shape[:-1], generator=generator) < 0.3).to(device) if segments else None
    torch.manual_seed(seed)
    y, (h_n, c_n) = module(given, hx, resets=resets)
    outputs = [data_of(y), h_n, c_n]
    cotangents = [torch.randn(t.shape, generator=generator).to(device) for t in outputs]
    leaves = [x, *hx, *module.parameters()]
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    return [t.detach() for t in outputs] + list(gradients)


def same_bits(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed, segments", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("reduce", [None, "norm"])
def test_results_and_gradients_are_the_same_bits(kind, backend, packed, segments, reduce, device):
    if backend == "torch" and device.type == "cuda" and KINDS[kind].get("num_layers", 1) > 1:
        pytest.skip("cuDNN rounds a stack of layers otherwise than one layer after another")
    module = module_of(device, **KINDS[kind], backend=backend)
    plain = step(module, packed, segments=segments)
    with triton_lstm.record_gradients(module, reduce=reduce) as grads:
        recorded = step(module, packed, segments=segments)
    assert len(grads) > 0 and same_bits(plain, recorded)
    assert same_bits(plain, step(module, packed, segments=segments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_on_the_cpu_are_recorded_as_a_stream(backend, device):
    module = module_of(device, bidirectional=True, backend=backend)
    x = torch.randn(9, 1, FEATURES, device=device)
    plain, _ = module(x, cu_seqlens=[0, 4, 5, 9])
    with triton_lstm.record_gradients(module) as grads:
        y, _ = module(x, cu_seqlens=[0, 4, 5, 9])
        y[4].sum().backward()
    torch.testing.assert_close(y, plain, rtol=1e-2, atol=1e-2)
    assert grads[0].hidden.shape == (9, 1, H) and grads[0].begun.nonzero().flatten().tolist() == [4, 5]
    assert [bool(t.any()) for t in grads[0].hidden] == [t == 4 for t in range(9)]


@pytest.fixture
def launches(monkeypatch):
    """The keywords of every launch, None left out."""
    import triton_lstm.operator.layer

    seen = []
    for name in ("lstm_forward", "lstm_backward"):
        shipped = getattr(triton_lstm.operator.layer, name)

        def spy(*args, name=name, shipped=shipped, **kwargs):
            seen.append((name, {k for k, v in kwargs.items() if v is not None}))
            return shipped(*args, **kwargs)

        monkeypatch.setattr(triton_lstm.operator.layer, name, spy)
    return seen


def saved_by(module):
    """The shapes of all that a step keeps for its backward pass."""
    shapes = []

    def pack(tensor):
        shapes.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(module)
    return shapes


@pytest.mark.parametrize("kind", KINDS)
def test_off_it_costs_nothing_and_on_no_launch(kind, device, launches):
    module = module_of(device, **KINDS[kind], backend="triton")
    off = saved_by(module)
    layers = module.num_layers
    assert [name for name, _ in launches] == ["lstm_forward"] * layers + ["lstm_backward"] * layers
    assert not any({"totals", "sums"} & given for _, given in launches)
    launches.clear()
    with triton_lstm.record_gradients(module):
        assert saved_by(module) == off
    assert [name for name, _ in launches] == ["lstm_forward"] * layers + ["lstm_backward"] * layers
    assert all("totals" in given for name, given in launches if name == "lstm_backward")
    launches.clear()
    with triton_lstm.record_gradients(module, reduce="norm"):
        step(module)
    assert all("sums" in given and "totals" not in given for name, given in launches if name == "lstm_backward")
    launches.clear()
    assert saved_by(module) == off and "_recordings" not in vars(module)
    assert not any({"totals", "sums"} & given for _, given in launches)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return function(*args, **(kwargs or {}))


def products(module, x):
    """In the backward pass of a call."""
    y = module(x)[0]
    with Products() as counted:
        y.sum().backward()
    return counted.count


def test_a_projection_costs_one_product_more(device):
    """The gradients of input and h0 cost one more each if nothing else requires them."""
    more = {}
    for proj_size in (0, 3):
        module = module_of(device, proj_size=proj_size, backend="triton")
        x = torch.randn(T, B, FEATURES, device=device)
        plain = products(module, x)
        with triton_lstm.record_gradients(module):
            more[proj_size] = products(module, x) - plain
    assert more == {0: 2, 3: 3}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("proj_size", [0, 3])
def test_nothing_outlives_what_was_recorded(backend, proj_size, device):
    module = module_of(device, backend=backend, proj_size=proj_size)
    x = torch.randn(T, B, FEATURES, device=device)
    with triton_lstm.record_gradients(module) as grads:
        y = module(x)[0]
        loss = y.sum()
        loss.backward(retain_graph=True)
    recorded = [weakref.ref(getattr(grads, name)) for name in ("h0", "c0")]
    recorded += [weakref.ref(t) for t in grads._recording.calls[0].layers[0].passes[0].rows[0].values()]
    recorder = weakref.ref(grads._recording.calls[0].layers[0])
    assert len(recorded) == 9 and all(ref() is not None for ref in recorded[2:])
    del grads  # the model, the graph and the loss live on
    gc.collect()
    assert recorder() is None and all(ref() is None for ref in recorded)
    loss.backward()
    assert y.grad_fn is not None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("proj_size", [0, 3])
def test_after_the_block_nothing_more_is_recorded_or_kept(backend, proj_size, device):
    module = module_of(device, backend=backend, proj_size=proj_size)
    x = torch.randn(T, B, FEATURES, device=device, requires_grad=True) * 1
    with triton_lstm.record_gradients(module) as grads:
        y = module(x)[0]
    given = weakref.ref(x)
    y.sum().backward()
    assert len(grads) == 0
    del x, y
    gc.collect()
    assert given() is None
    with pytest.raises(
        RuntimeError, match=r"'LSTM' was called 1 time, but no backward pass reached it inside the block"
    ):
        grads.frame()


def test_what_autograd_adds_to_in_place_is_not_what_was_recorded(device):
    """A second backward pass adds to x.grad and hx's in place, whose memory a gradient without a copy would share."""
    module = module_of(device, backend="triton")
    x = torch.randn(T, FEATURES, device=device, requires_grad=True)
    hx = tuple(torch.zeros(1, H, device=device, requires_grad=True) for _ in range(2))
    with triton_lstm.record_gradients(module) as grads:
        y = module(x, hx)[0]
        leaf = torch.zeros_like(y, requires_grad=True)
        loss = (y + leaf).sum()
        loss.backward(retain_graph=True)
        before = {name: getattr(grads, name).clone() for name in ("input", "output", "h0", "c0")}
        loss.backward()
    first = grads.select(backward=0)
    for name, tensor in before.items():
        assert tensor.any() and torch.equal(getattr(first, name), tensor), name
    assert torch.equal(x.grad, 2 * before["input"]) and torch.equal(leaf.grad, 2 * before["output"])


def nodes_of(*outputs):
    """Every node of the autograd graph behind `outputs`."""
    found, waiting = set(), [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("proj_size", [0, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_changed_afterwards_is_not_what_was_recorded(backend, proj_size, both, device):
    """A user's own cotangents, gradients, input, states and weights, all of them zeroed after the pass; nor is it the
    memory of anything that went from one node of the graph to another."""
    module = module_of(device, backend=backend, proj_size=proj_size, bidirectional=both)
    x = torch.randn(T, B, FEATURES, device=device, requires_grad=True)
    hx = [torch.randn(shape, device=device, requires_grad=True) for shape in state_shapes(module, B)]
    handed: list[torch.Tensor] = []
    with triton_lstm.record_gradients(module) as grads:
        y, (h_n, c_n) = module(x, hx)
        given = [torch.randn_like(tensor) for tensor in (y, h_n, c_n)]
        for node in nodes_of(y, h_n, c_n):
            node.register_hook(lambda *grads: handed.extend(t for side in grads for t in side if t is not None))
        torch.autograd.backward([y, h_n, c_n], given)
        [backward] = grads._recording.calls[0].layers[0].passes
        recorded = [row[name] for row in backward.rows for name in row]
        before = [tensor.clone() for tensor in recorded]
        assert len(recorded) == 7 * (1 + both) and all(tensor.any() for tensor in recorded)
        given += [tensor.grad for tensor in (x, *hx, *module.parameters())]
        with torch.no_grad():
            for tensor in (*given, x, *hx, y, h_n, c_n, *module.parameters()):
                tensor.zero_()
    own, theirs = ({t.untyped_storage().data_ptr() for t in tensors} for tensors in (recorded, handed))
    assert theirs and not own & theirs
    assert all(torch.equal(tensor, as_it_was) for tensor, as_it_was in zip(recorded, before, strict=True))


def test_copies_made_inside_the_block_are_not_recorded(device):
    module = module_of(device, backend="triton")
    with triton_lstm.record_gradients(module) as grads:
        twin = copy.deepcopy(module)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        for other in (twin, torch.load(file, weights_only=False)):
            other(torch.randn(T, B, FEATURES, device=device))[0].sum().backward()
    assert len(grads) == 0 and "_recordings" not in vars(module)


def test_memory_of_norms_does_not_grow_with_the_batch(device):
    """Everything kept grows with T; elements grow with B too."""
    kept = {}
    for reduce in (None, "norm"):
        for batch in (2, 64):
            module = module_of(device, backend="triton", bidirectional=True)
            with triton_lstm.record_gradients(module, reduce=reduce) as grads:
                module(torch.randn(T, batch, FEATURES, device=device))[0].sum().backward()
            [backward] = grads._recording.calls[0].layers[0].passes
            tensors = [t for row in backward.rows for t in row.values()] + backward.saturated
            tensors += [t for known in backward.statistics for statistics in known.values() for t in statistics]
            kept[reduce, batch] = sum(t.untyped_storage().nbytes() for t in tensors)
    assert kept["norm", 64] == kept["norm", 2]
    assert kept[None, 64] > 20 * kept[None, 2]


@pytest.mark.parametrize("packed", [False, True])
def test_a_program_adds_up_its_batch_tiles(packed, device, monkeypatch):
    """It takes them in turn, all into one place: as much memory for one tile as for four."""
    import triton_lstm.operator.layer

    plan = Plan("flag", COMPILED, True, 16, 16, 16, 1, groups=1, warps=4)
    monkeypatch.setattr(triton_lstm.operator.layer, "plan_for", lambda *_, backward: plan)
    sizes = []
    shipped = triton_lstm.operator.layer.sums_for
    monkeypatch.setattr(triton_lstm.operator.layer, "sums_for", lambda *a: sizes.append(shipped(*a)) or sizes[-1])
    module = module_of(device, backend="triton", bidirectional=True)
    for batch in (16, 50):
        x = torch.randn(T, batch, FEATURES, device=device)
        x = pack_padded_sequence(x, [1 + k % T for k in range(batch)], enforce_sorted=False) if packed else x
        found = []
        for reduce in (None, "norm"):
            with triton_lstm.record_gradients(module, reduce=reduce) as grads:
                data_of(module(x)[0]).square().sum().backward()
            found.append([record.statistics() for record in grads])
        for whole, norms in zip(*found, strict=True):
            for name, statistics in whole.items():
                assert statistics.norm.any(), name
                torch.testing.assert_close(norms[name], statistics, rtol=1e-6, atol=1e-9)
    assert sizes[0].shape == sizes[1].shape == (T, 2, 1, 2, 5)
