"""record_gradients against autograd on PyTorch's equations in float64, in every layout and on every path."""

import pytest
import torch
from compiled import COMPILED
from gradient_oracle import expected, fake_dropout, sequences_of
from oracle import data_of, state_shapes
from pairs import all_pairs, case_id
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import triton_lstm
from triton_lstm.core.tolerance import Allowance, draws, enlarge
from triton_lstm.gradients.statistics import StepStatistics
from triton_lstm.gradients.summary import growth, reach, state_norms
from triton_lstm.planning.plan import Plan
from triton_lstm.settings import layer_dtype

FEATURES, T = 3, 5
pytestmark = pytest.mark.filterwarnings("ignore:dropout option adds dropout:UserWarning")
QUANTITIES = ("input", "output", "hidden", "cell", "gates", "h0", "c0")
GATES = ("i", "f", "g", "o")
LENGTHS = [2, 5, 4, 1]
FACTORS = {
    "layout": ["dense", "batch_first", "unbatched", "packed", "sorted", "lengths", "lengths batch_first", "T=1"],
    "backend": ["triton", "torch"],
    "layers": [1, 2],
    "both": [False, True],
    "proj": [0, 2],
    "bias": [False, True],
    "dropout": [0.0, 0.5],
    "hx": [False, True],
    "recompute": [False, True],
    "states": [False, True],
    "plan": ["none", "several programs"],
    "needs input": [False, True],
    "resets": [False, True],
}


def several_programs(device):
    """In the interpreter one launch per step, on a GPU a single one with the flag exchange."""
    return Plan("flag", COMPILED, True, 16, 16, 16, 1, groups=1, warps=4)


def same(what, got, exact, close):
    assert_close(got, exact, **close, msg=lambda text: f"{what}: {text}")


def module_of(case, device, dtype, hidden_size=6):
    torch.manual_seed(0)
    return triton_lstm.LSTM(
        FEATURES,
        hidden_size,
        case["layers"],
        bias=case["bias"],
        batch_first=case["layout"].endswith("batch_first"),
        dropout=case["dropout"],
        bidirectional=case["both"],
        proj_size=case["proj"],
        backend=case["backend"],
        recompute=case["recompute"],
        device=device,
        dtype=dtype,
    )


def input_of(layout, device, dtype):
    """The module's input, its keywords, and the sequences in it."""
    if layout == "unbatched":
        x = torch.randn(T, FEATURES, device=device, dtype=dtype)
        return x, {}, [x]
    steps = 1 if layout == "T=1" else T
    x = torch.randn(len(LENGTHS), steps, FEATURES, device=device, dtype=dtype)
    lengths = sorted(LENGTHS, reverse=True) if layout == "sorted" else LENGTHS
    if layout.startswith("lengths"):
        sequences = [row[:n] for row, n in zip(x, lengths, strict=True)]
        return x if layout.endswith("batch_first") else x.transpose(0, 1), {"lengths": lengths}, sequences
    if layout in ("packed", "sorted"):
        sequences = [row[:n] for row, n in zip(x, lengths, strict=True)]
        return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=layout == "sorted"), {}, sequences
    return x if layout == "batch_first" else x.transpose(0, 1), {}, list(x)


def resets_of(layout, sequences):
    """Random ones, but no first one of the first sequence; as the module takes them, and of each sequence."""
    rows = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.bool)
    rows[:, 1:] = torch.rand(rows[:, 1:].shape) < 0.4
    rows[1:, 0] = True
    of_sequences = [row[: len(sequence)] for row, sequence in zip(rows, sequences, strict=True)]
    if layout == "unbatched":
        return rows[0], of_sequences
    if layout in ("packed", "sorted"):
        lengths = [len(sequence) for sequence in sequences]
        return pack_padded_sequence(rows, lengths, batch_first=True, enforce_sorted=False).data, of_sequences
    return rows if layout.endswith("batch_first") else rows.t(), of_sequences


def cotangents_of(outputs, sequences, batch_first):
    """Random ones of output, h_n and c_n, as the model has them and as the oracle does."""
    y, h_n, c_n = outputs
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (data_of(y), h_n, c_n)]
    theirs = given[0] if y is data_of(y) else y._replace(data=given[0].to(y.data.device))
    lengths = [len(sequence) for sequence in sequences]
    if y is data_of(y) and y.dim() == 3:  # past a sequence's end the output is a constant
        rows = theirs if batch_first else theirs.transpose(0, 1)
        of_sequences = [row[:n] for row, n in zip(rows, lengths, strict=True)]
    else:
        of_sequences = sequences_of(theirs, lengths, batch_first)
    h_n, c_n = (t if t.dim() == 3 else t.unsqueeze(1) for t in given[1:])
    return given, (of_sequences, h_n, c_n)


def record(case, device, dtype, **kwargs):
    """What was recorded of a random call, what is expected, all lengths, and the cotangents of h_n and c_n."""
    module = module_of(case, device, dtype)
    x, keywords, sequences = input_of(case["layout"], device, dtype)
    if case["needs input"]:
        data_of(x).requires_grad_()
    hx = tuple(torch.randn(shape, device=device, dtype=dtype) for shape in state_shapes(module, len(sequences)))
    zeros = tuple(torch.zeros_like(state) for state in hx)
    resets = None
    if case["resets"]:
        given, resets = resets_of(case["layout"], sequences)
        keywords["resets"] = given.to(device)
    given = [state.squeeze(1) if case["layout"] == "unbatched" else state for state in hx] if case["hx"] else None
    with triton_lstm.record_gradients(module, **kwargs) as grads:
        y, (h_n, c_n), *_ = module(x, given, return_states=case["states"], **keywords)
        cotangents, for_oracle = cotangents_of((y, h_n, c_n), sequences, module.batch_first)
        outputs = [data_of(y), h_n, c_n]
        torch.autograd.backward(outputs, [c.to(t) for c, t in zip(cotangents, outputs, strict=True)])
    right = expected(module, sequences, hx if case["hx"] else zeros, for_oracle, resets=resets)
    return grads, right, [len(s) for s in sequences], for_oracle[1:]


def asked_of_steps(outputs, h_n, c_n, against_time, steps):
    """The norm of the loss's own gradients of a step; outputs: of each sequence (T, ..); h_n, c_n: (B, ..)."""
    squares = torch.zeros(steps, dtype=torch.float64)
    for output, h, c in zip(outputs, h_n, c_n, strict=True):
        own, end = output.clone(), 0 if against_time else len(output) - 1
        own[end] += h
        squares[: len(own)] += own.square().sum(-1)
        squares[end] += c.square().sum()
    return squares.sqrt()


@pytest.mark.parametrize("case", all_pairs(FACTORS), ids=case_id)
def test_against_autograd(case, device, precise, monkeypatch):
    dtype, close = precise
    if case["plan"] == "several programs":
        monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: several_programs(device))
    if case["backend"] == "torch":
        dtype, close = torch.float64, dict(rtol=1e-10, atol=1e-12)
    monkeypatch.setattr(torch.nn.functional, "dropout", fake_dropout)
    grads, right, lengths, of_states = record(case, device, dtype)
    assert len(grads) == len(right)
    for (layer, direction), quantities in right.items():
        found = grads.select(layer=layer, direction=("forward", "reverse")[direction])[0]
        assert found.module == "LSTM" and found.call == found.backward == 0 and found.steps == max(lengths)
        assert found.lengths is None or found.lengths.tolist() == lengths
        assert (found.begun is not None) == case["resets"]
        assert (found.lengths is None) == (not {"packed", "sorted", "lengths"} & set(case["layout"].split()))
        for name in QUANTITIES:
            value = getattr(found, name)
            if name == "gates":
                parts = [getattr(value, gate) for gate in GATES]
                value = value.all
                assert_close(torch.cat([data_of(part) for part in parts], -1), data_of(value), rtol=0, atol=0)
            if name in ("h0", "c0"):
                rows = [value] if case["layout"] == "unbatched" else list(value)
            else:
                rows = sequences_of(value, lengths, grads[0]._layout.batch_first)
            assert quantities[name][0].any(), "a zero would pass for this"
            for got, exact in zip(rows, quantities[name], strict=True):
                same(f"{name}, layer {layer}", got.double().cpu(), exact, close)
        h_n, c_n = (state[layer * (1 + case["both"]) + direction] for state in of_states)
        exact = asked_of_steps(quantities["output"], h_n, c_n, direction == 1, found.steps)
        same(f"asked, layer {layer}", found.asked.cpu(), exact, close)


@pytest.mark.parametrize("case", all_pairs(FACTORS, seed=1), ids=case_id)
def test_norms_only_are_the_statistics_of_every_element(case, device, precise, monkeypatch):
    dtype, close = precise
    if case["plan"] == "several programs":
        monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: several_programs(device))
    monkeypatch.setattr(torch.nn.functional, "dropout", fake_dropout)
    whole, norms = (record(case, device, dtype, reduce=reduce)[0] for reduce in (None, "norm"))
    assert len(whole) == len(norms)
    for a, b in zip(whole, norms, strict=True):
        assert a.every_element and not b.every_element
        with pytest.raises(RuntimeError, match="only norms were recorded"):
            _ = b.hidden
        assert a.statistics().keys() == b.statistics().keys()
        for name, statistics in a.statistics().items():
            for field in StepStatistics._fields:
                got, exact = (getattr(s, field) for s in (b.statistics()[name], statistics))
                assert got.dtype == torch.float64 and got.shape == exact.shape
                same(f"{field} of {name}", got, exact, close)
        assert_close(a.saturated, b.saturated)
        assert b.asked.dtype == torch.float64
        same("asked", b.asked, a.asked, close)


@pytest.mark.parametrize("layout", ["dense", "packed", "batch_first", "unbatched"])
def test_where_segments_begin(layout, device):
    lstm = triton_lstm.LSTM(FEATURES, 4, batch_first=layout == "batch_first").to(device)
    x, _, sequences = input_of(layout, device, torch.float32)
    resets, of_sequences = resets_of(layout, sequences)
    with triton_lstm.record_gradients(lstm, reduce="norm") as grads:
        data_of(lstm(x, resets=resets.to(device))[0]).sum().backward()
    count, begun = (
        [sum(bool(row[t]) for row in rows if t < len(row)) for t in range(T)]
        for rows in ([torch.ones_like(row) for row in of_sequences], of_sequences)
    )
    exact = torch.tensor(begun, dtype=torch.float64) / torch.tensor(count)
    assert torch.equal(grads[0].begun.cpu(), exact)
    pytest.importorskip("pandas")
    frame = grads.frame()
    assert frame.query("quantity == 'hidden'")["begun"].tolist() == exact.tolist()
    assert (frame.query("step == -1")["begun"] == 0).all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_summary_knows_segments(direction, device):
    """A gradient that grows in one segment, and reaches no further; another that enters in the next one."""
    torch.manual_seed(0)
    lstm = triton_lstm.LSTM(FEATURES, 8, bidirectional=True).to(device)
    x, resets = torch.randn(30, 2, FEATURES, device=device), torch.zeros(30, 2, dtype=torch.bool, device=device)
    resets[[7, 20]] = True
    resets[12, 0] = True
    with triton_lstm.record_gradients(lstm) as grads:
        y, _ = lstm(x, resets=resets)
        (y[25 if direction == "forward" else 5].sum() + 0.1 * y[10].sum()).backward()
    text = grads.select(direction=direction).summary()
    assert "segments: some begin at 3 of the 29 steps after the first, in all sequences at 2" in text
    assert "no gradient crosses" in text
    (found,) = grads.select(direction=direction)
    start, end = (25, 20) if direction == "forward" else (5, 6)
    reached = reach(found, state_norms(found.statistics()))
    assert (reached.largest, reached.end) == (start, end) and f"is largest at step {start} " in text
    norms = found.statistics()["hidden"].norm
    assert not norms[11:20].any() if direction == "forward" else not norms[20:].any()


def test_what_entered_in_another_segment_makes_no_growth_small(device):
    """Little enters at step 5 and grows, going back to step 3; at step 6, behind a cut, much more has entered."""
    lstm = triton_lstm.LSTM(FEATURES, 4).to(device)
    x, resets = torch.randn(7, 2, FEATURES, device=device), torch.zeros(7, 2, dtype=torch.bool, device=device)
    resets[6] = True
    with triton_lstm.record_gradients(lstm) as grads:
        lstm(x, resets=resets)[0].sum().backward()
    (record,) = grads
    norms, asked = [0, 0, 0, 5.0, 0, 1.0, 100.0], [0, 0, 0, 0, 0, 1.0, 100.0]
    assert growth(record, norms, asked) == (5.0, 3)
    record.begun = None
    assert growth(record, norms, asked)[0] < 1


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("both", [False, True])
def test_what_is_asked_of_c_and_the_gates(both, backend, device):
    torch.manual_seed(0)
    lstm = triton_lstm.LSTM(FEATURES, 4, bidirectional=both, backend=backend).to(device)
    x = torch.randn(T, 2, FEATURES, device=device)
    with triton_lstm.record_gradients(lstm) as grads:
        layer = lstm(x, return_states=True)[2][0]
        wanted = torch.randn(2, *layer.c.shape, device=device)
        ((layer.c * wanted[0]).sum() + (layer.f * wanted[1]).sum()).backward()
    for found, own in zip(grads, wanted.double().chunk(1 + both, -1), strict=True):
        assert_close(found.asked, own.square().sum((0, 2, 3)).sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("proj", [0, 4])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_accuracy_in_every_dtype(dtype, proj, backend, device):
    """By the rule for every comparison: PyTorch's own error is that of its equations computed in the dtype."""
    between = backend == "torch" and device.type == "cuda"  # would be cuDNN's own error, which is larger
    case = dict(
        layers=1 if between else 2,
        both=True,
        bias=True,
        proj=proj,
        dropout=0.0,
        recompute=False,
        backend=backend,
        layout="",
        resets=False,
    )
    module = enlarge(module_of(case, device, dtype, hidden_size=17))
    exact, own, recorded = [], [], []
    for draw in range(draws(T * len(LENGTHS) * FEATURES)):
        torch.manual_seed(draw)
        x, _, sequences = input_of("dense", device, dtype)
        hx = tuple(torch.randn(shape, device=device, dtype=dtype) for shape in state_shapes(module, len(sequences)))
        with triton_lstm.record_gradients(module) as grads:
            y, states = module(x, hx)
            given, for_oracle = cotangents_of((y, *states), sequences, False)
            given = [cotangent.to(y) for cotangent in given]
            torch.autograd.backward([y, *states], given)
        for_oracle = [row.to(dtype) for row in for_oracle[0]], *given[1:]
        for answers, kind in ((exact, torch.float64), (own, dtype)):
            found = expected(module, sequences, hx, for_oracle, kind)
            answers.append({(*at, name): torch.stack(rows, -2) for at, q in found.items() for name, rows in q.items()})
        recorded.append(grads)
    allowance = Allowance(exact, own)
    computed = layer_dtype(dtype, proj > 0) if backend == "triton" else dtype
    for layer, direction, name in exact[0]:
        value = getattr(recorded[allowance.draw].select(layer=layer, direction=("forward", "reverse")[direction]), name)
        value = (value.all if name == "gates" else value).cpu()
        assert value.dtype == (torch.float32 if name in ("hidden", "cell") else computed)
        share = allowance.share((layer, direction, name), value)
        assert share <= 1, f"{name} of layer {layer}, direction {direction}: {share:.3g} times what is allowed"
