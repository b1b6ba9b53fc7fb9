"""resets=: the results of each segment run alone, and nothing of one in another."""

import pytest
import torch
from compiled import COMPILED
from oracle import assert_like_nn_lstm, data_of, run, state_shapes
from pairs import all_pairs, case_id
from segments_alone import alone
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import triton_lstm
from triton_lstm.core.tolerance import enlarge
from triton_lstm.planning.plan import Plan

T, LENGTHS = 7, [4, 7, 1, 7, 3] + [2] * 13  # a second batch tile
KINDS = ["random", "many", "all", "none", "first", "last", "one sequence"]
FACTORS = {
    "resets": KINDS,
    "layout": ["dense", "batch_first", "unbatched", "packed", "lengths", "one step"],
    "backend": ["triton", "torch"],
    "layers": [1, 2],
    "both": [False, True],
    "proj": [0, 4],
    "bias": [False, True],
    "dtype": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "hx": [False, True],
    "recompute": [False, True],
    "plan": ["none", "flag", "barrier"],
    "H": [6, 33],
}


def several_programs(exchange: str) -> Plan:
    """In the interpreter one launch per step, on a GPU all steps in one; with no exchange, one program."""
    if exchange == "none":
        return Plan("none", True, True, 16, 64, 64, 1, groups=1, warps=4)
    return Plan(exchange, COMPILED, True, 16, 16, 16, 1, groups=1, warps=4)


def draw_resets(kind: str, *shape: int) -> torch.Tensor:
    """(T, B) on the CPU."""
    resets = torch.rand(shape) < {"random": 0.2, "many": 0.7}.get(kind, 0)
    if kind == "all":
        resets[:] = True
    if kind in ("first", "last"):
        resets[0 if kind == "first" else -1] = True
    if kind == "one sequence":
        resets[:, 0] = True
    return resets


def arguments(case, module, device):
    """x, the same rows of resets, and lengths or None."""
    steps, batch = (1 if case["layout"] == "one step" else T), len(LENGTHS)
    x, resets = torch.randn(steps, batch, 3).to(module.weight_hh_l0), draw_resets(case["resets"], steps, batch)
    resets = resets.to(device)
    if case["layout"] == "unbatched":
        return x[:, 0], resets[:, 0], None
    if case["layout"] == "packed":
        x, packed = (pack_padded_sequence(t, torch.tensor(LENGTHS), enforce_sorted=False) for t in (x, resets))
        return x, packed.data, None
    if case["layout"] == "batch_first":
        return x.transpose(0, 1).contiguous(), resets.t(), None
    return x, resets, LENGTHS if case["layout"] == "lengths" else None


@pytest.mark.unmeasured
@pytest.mark.parametrize("case", all_pairs(FACTORS), ids=case_id)
def test_like_every_segment_alone(case, device, monkeypatch):
    if case["dtype"] == torch.float64 and COMPILED:
        pytest.skip("float64 on a GPU goes to PyTorch's own LSTM")
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: several_programs(case["plan"]))
    torch.manual_seed(0)
    kwargs = dict(num_layers=case["layers"], bidirectional=case["both"], bias=case["bias"], proj_size=case["proj"])
    kwargs |= dict(batch_first=case["layout"] == "batch_first")
    module = triton_lstm.LSTM(3, case["H"], **kwargs, recompute=case["recompute"], backend=case["backend"])
    enlarge(module).to(device, case["dtype"])
    _, resets, lengths = arguments(case, module, device)
    shapes = state_shapes(module, len(LENGTHS))

    def draw():
        x, *_ = arguments(case, module, device)
        hx = tuple(torch.randn(shape).to(data_of(x)) for shape in shapes) if case["hx"] else None
        unbatched = case["layout"] == "unbatched"
        return x, tuple(state[:, 0] for state in hx) if hx and unbatched else hx

    def ours(module, x, hx):
        return module(x, hx, resets=resets, lengths=lengths)

    def theirs(module, x, hx):
        return alone(module, x, hx, resets, lengths)

    assert_like_nn_lstm(module, draw, ours=ours, theirs=theirs, **kwargs)


def test_resets_matter(device):
    """The proof that the test above can fail: the same comparison with resets that were not asked for."""
    torch.manual_seed(0)
    module = triton_lstm.LSTM(3, 6, backend="triton").to(device)
    x, resets = torch.randn(T, 2, 3, device=device), draw_resets("last", T, 2).to(device)
    got, plain = run(module, x, None, call=lambda m, x, hx: m(x, resets=resets)), run(module, x, None)
    assert torch.equal(got["y"][:-1], plain["y"][:-1]) and not torch.isclose(got["y"][-1], plain["y"][-1]).any()
    for name in ("dx", "dweight_hh_l0"):
        assert not torch.allclose(got[name], plain[name], atol=1e-3)


@pytest.mark.unmeasured
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("plan", ["none", "flag", "barrier"])
def test_none_set_changes_no_bit(plan, both, device, monkeypatch):
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: several_programs(plan))
    torch.manual_seed(0)
    module = triton_lstm.LSTM(3, 20, bidirectional=both, backend="triton").to(device)
    x = torch.randn(T, 3, 3, device=device)
    hx = tuple(torch.randn(shape, device=device) for shape in state_shapes(module, 3))
    resets = torch.zeros(T, 3, dtype=torch.bool, device=device)
    got, plain = run(module, x, hx, call=lambda m, x, hx: m(x, hx, resets=resets)), run(module, x, hx)
    assert all(torch.equal(got[name], plain[name]) for name in plain)


@pytest.mark.unmeasured
@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("plan", ["none", "flag", "barrier"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nonfinite_values_stay_in_their_segment(backend, value, plan, recompute, layout, device, monkeypatch):
    """In the data of one segment and in its cotangents; its neighbours in time and in the batch know nothing of it."""
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: several_programs(plan))
    torch.manual_seed(0)
    module = triton_lstm.LSTM(3, 20, bidirectional=True, recompute=recompute, backend=backend).to(device)
    x, resets, dy = torch.randn(6, 3, 3), torch.zeros(6, 3, dtype=torch.bool), torch.randn(6, 3, 40)
    resets[2, 1] = resets[4, 1] = True
    x[3, 1, 0] = dy[2, 1, 0] = dy[3, 1, 25] = value
    if layout == "packed":
        x, resets, dy = (pack_padded_sequence(t, torch.tensor([6, 6, 5])) for t in (x, resets, dy))
        resets, dy = resets.data, dy.data
    rows = data_of(x).to(device).requires_grad_()
    y, (h_n, c_n) = module(x._replace(data=rows) if layout == "packed" else rows, resets=resets.to(device))
    y = data_of(y)
    assert h_n.isfinite().all() and c_n.isfinite().all()
    torch.autograd.backward([y, h_n, c_n], [dy.to(device), torch.ones_like(h_n), torch.ones_like(c_n)])
    others = torch.ones(6, 3, dtype=torch.bool)
    others[2:4, 1] = False
    others = pack_padded_sequence(others, torch.tensor([6, 6, 5])).data if layout == "packed" else others
    assert y[others].isfinite().all() and rows.grad[others].isfinite().all()
    assert not rows.grad[~others].isfinite().all()


@pytest.mark.parametrize("kwargs", [{}, dict(bidirectional=True, num_layers=2), dict(proj_size=2)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_states(backend, kwargs, device, precise):
    """c and the gates of every step are those of the segments."""
    dtype, close = precise
    torch.manual_seed(0)
    module = triton_lstm.LSTM(3, 5, **kwargs, backend=backend).to(device, dtype)
    x, resets = torch.randn(T, 4, 3).to(device, dtype), draw_resets("random", T, 4)
    resets[3] = True
    _, _, layers = module(x, resets=resets.to(device), return_states=True)
    parts = [module(x[a:b], resets=resets[a:b].to(device), return_states=True)[2] for a, b in ((0, 3), (3, T))]
    for k, layer in enumerate(layers):
        for t, *of_parts in zip(layer, *(part[k] for part in parts), strict=True):
            torch.testing.assert_close(t, torch.cat(of_parts), **close)
    if not kwargs:
        torch.testing.assert_close(layers[0].c[resets], (layers[0].i * layers[0].g)[resets], **close)


def test_a_tile_waits_for_nobody_where_all_of_its_rows_begin_a_segment(interpreter, monkeypatch):
    """Of two batch tiles, one has a step at which segments begin in all of its rows."""
    from triton_lstm.kernels import exchange

    targets = []
    shipped = exchange.await_rows

    def spy(rows_ptr, live, segments, counter_ptr, target, *rest):
        targets.append(int(target.handle.data.item()) if hasattr(target, "handle") else int(target))
        return shipped(rows_ptr, live, segments, counter_ptr, target, *rest)

    monkeypatch.setattr(exchange, "await_rows", spy)
    one_launch = Plan("barrier", True, True, 4, 16, 16, 1, groups=1, warps=4)  # of one program: it never has to wait
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: one_launch)
    module = triton_lstm.LSTM(3, 16, backend="triton")
    resets = torch.zeros(5, 8, dtype=torch.bool)
    resets[2, :4] = True  # the first tile
    resets[3, 4:7] = True  # not all of the second one
    with torch.no_grad():
        module(torch.randn(5, 8, 3), resets=resets)
    assert [targets[:5], targets[5:]] == [[0, 1, 0, 3, 4], [0, 1, 2, 3, 4]]


REFUSED = [
    (lambda x: [[True]], TypeError, r"got list: pass torch.as_tensor\(resets"),
    (lambda x: torch.zeros(x.shape[:-1]), ValueError, r"got torch.float32: pass resets.bool\(\)"),
    (lambda x: torch.zeros(3, 9, dtype=torch.bool), ValueError, r"without its features, \(4, 2\), got \(3, 9\)$"),
    (lambda x: torch.zeros(2, 4, dtype=torch.bool), ValueError, r"got \(2, 4\): pass resets.t\(\)"),
    (lambda x: torch.zeros(x.shape, dtype=torch.bool), ValueError, r"got \(4, 2, 3\)"),
    (lambda x: torch.zeros(4, 2, dtype=torch.bool, device="meta"), RuntimeError, "not at the same device"),
]


@pytest.mark.parametrize("make, error, says", REFUSED)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_what_does_not_fit_is_refused(backend, make, error, says, device):
    module, x = triton_lstm.LSTM(3, 4, backend=backend).to(device), torch.randn(4, 2, 3, device=device)
    with pytest.raises(error, match=says):
        module(x, resets=make(x))
    with pytest.raises(error, match=says):
        triton_lstm.lstm(x, None, list(module.parameters()), resets=make(x), backend=backend)
    with pytest.raises(error):
        module(x, resets=make(x), lengths=[4, 2])


def test_of_unbatched_and_packed_input_they_have_the_rows(device):
    module = triton_lstm.LSTM(3, 4, backend="triton").to(device)
    with pytest.raises(ValueError, match=r"\(4,\), got \(4, 1\)"):
        module(torch.randn(4, 3, device=device), resets=torch.zeros(4, 1, dtype=torch.bool, device=device))
    packed = pack_padded_sequence(torch.randn(4, 2, 3, device=device), torch.tensor([4, 2]))
    with pytest.raises(ValueError, match=r"\(6,\), got \(4, 2\); of a PackedSequence they are its rows"):
        module(packed, resets=torch.zeros(4, 2, dtype=torch.bool, device=device))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_state_that_alone_requires_grad(backend, device, precise):
    """What the projection makes of h0 is added to what requires no gradient."""
    dtype, close = precise
    torch.manual_seed(0)
    module = triton_lstm.LSTM(3, 5, proj_size=2, backend=backend).to(device, dtype).requires_grad_(False)
    x, resets = torch.randn(T, 2, 3).to(device, dtype), draw_resets("random", T, 2)
    resets[0] = torch.tensor([True, False])
    h0, c0 = torch.randn(1, 2, 2).to(x).requires_grad_(), torch.randn(1, 2, 5).to(x)
    y, _, layers = module(x, (h0, c0), resets=resets.to(device), return_states=True)
    (got,) = torch.autograd.grad(y.sum() + layers[0].c.sum(), h0)
    assert not got[0, 0].any() and got[0, 1].any()
    y, _, layers = module(x[:, 1:], (h0[:, 1:], c0[:, 1:]), resets=resets[:, 1:].to(device), return_states=True)
    (expected,) = torch.autograd.grad(y.sum() + layers[0].c.sum(), h0)
    torch.testing.assert_close(got[0, 1], expected[0, 1], **close)


def test_any_byte_but_zero_is_true(device):
    """As torch.where and indexing have it."""
    module, x = triton_lstm.LSTM(3, 4, backend="triton").to(device), torch.randn(4, 3, 3, device=device)
    odd = torch.zeros(4, 3, dtype=torch.uint8, device=device)
    odd[2, 0], odd[3, 1] = 2, 255
    torch.testing.assert_close(module(x, resets=odd.view(torch.bool)), module(x, resets=odd != 0))


def test_an_empty_batch(device):
    for backend in ("triton", "torch"):
        module = triton_lstm.LSTM(4, 8, 2, backend=backend).to(device)
        resets = torch.zeros(3, 0, dtype=torch.bool, device=device)
        y, (h_n, c_n) = module(torch.zeros(3, 0, 4, device=device), resets=resets)
        assert y.shape == (3, 0, 8) and h_n.shape == c_n.shape == (2, 0, 8)


def test_by_one_call_of_torch_lstm(device, monkeypatch):
    """PyTorch's path has no loop over time or segments."""
    shipped, calls = torch.lstm, []
    monkeypatch.setattr(torch, "lstm", lambda *args: calls.append(args) or shipped(*args))
    module = triton_lstm.LSTM(3, 4, 2, bidirectional=True, backend="torch").to(device)
    resets = draw_resets("random", 50, 8)
    module(torch.randn(50, 8, 3, device=device), resets=resets.to(device))
    [(_, batch_sizes, *_)] = calls
    begun = resets.clone()
    begun[0] = True
    assert int(batch_sizes[0]) == int(begun.sum()) and len(batch_sizes) < 50


def test_nn_lstm_in_the_same_autocast(device):
    torch.manual_seed(0)
    module = triton_lstm.LSTM(3, 6, 2).to(device)
    x, resets = torch.randn(T, 4, 3, device=device), draw_resets("random", T, 4).to(device)
    hx = tuple(torch.randn(shape, device=device) for shape in state_shapes(module, 4))
    twin = nn.LSTM(3, 6, 2).to(device)
    twin.load_state_dict(module.state_dict())
    with torch.autocast(device.type, dtype=torch.bfloat16):
        (y, _), (expected, _) = module(x, hx, resets=resets), alone(twin, x, hx, resets)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.05, atol=0.02)


def test_packed_output_keeps_its_kind(device):
    packed = pack_padded_sequence(torch.randn(4, 2, 3, device=device), torch.tensor([4, 2]))
    y, _ = triton_lstm.LSTM(3, 4).to(device)(packed, resets=torch.ones(6, dtype=torch.bool, device=device))
    assert isinstance(y, PackedSequence) and torch.equal(y.batch_sizes, packed.batch_sizes)
