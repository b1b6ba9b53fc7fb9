"""Segments that run side by side, against each of them alone; plain PyTorch, no kernels."""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from triton_lstm.core.packing import Rows
from triton_lstm.core.segments import arranged, refuse_in_onnx, resets_at, segments_of, without_reset

CPU = torch.device("cpu")
LENGTHS = {"dense": [5, 5, 5], "packed": [5, 4, 4, 1]}
BEGINS = [{2}, {1, 2, 4}, set(), {3}]  # of each sequence's steps; what is beyond its end does not count


class Pair(NamedTuple):
    """As the states of a layer."""

    plus: torch.Tensor
    minus: torch.Tensor


class Case:
    """sequences: the steps of each, (T, 4); x, resets, batch_sizes: the same as rows; pieces: each one's segments."""

    def __init__(self, layout: str) -> None:
        torch.manual_seed(0)
        self.sequences = [torch.randn(n, 4) for n in LENGTHS[layout]]
        begins = BEGINS[: len(self.sequences)]
        marks = [torch.tensor([t in own for t in range(len(s))]) for s, own in zip(self.sequences, begins, strict=True)]
        packed = pack_sequence(self.sequences)
        self.batch_sizes = packed.batch_sizes if layout == "packed" else None
        self.x = packed.data if layout == "packed" else torch.stack(self.sequences, 1)
        self.resets = pack_sequence(marks).data if layout == "packed" else torch.stack(marks, 1)
        self.pieces = []
        for sequence, own in zip(self.sequences, begins, strict=True):
            cuts = [0, *sorted(t for t in own if t < len(sequence)), len(sequence)]
            self.pieces.append([sequence[a:b] for a, b in itertools.pairwise(cuts)])
        self.segments = segments_of(self.resets, self.batch_sizes, CPU)

    def rows(self, sequences: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(sequences, 1) if self.batch_sizes is None else pack_sequence(sequences).data


@pytest.fixture(params=list(LENGTHS))
def case(request) -> Case:
    return Case(request.param)


def test_rows_are_those_of_the_segments_packed(case):
    pieces = [piece for own in case.pieces for piece in own]
    expected = pack_sequence(pieces, enforce_sorted=False)
    assert torch.equal(case.segments.packed(case.x), expected.data)
    assert torch.equal(case.segments.batch_sizes, expected.batch_sizes) and case.segments.number == len(pieces)
    assert torch.equal(case.segments.unpacked(expected.data, case.x.shape[:-1]), case.x)
    firsts, lasts = (torch.stack([own[end][0] for own in case.pieces]) for end in (0, -1))
    assert torch.equal(expected.data[case.segments.first], firsts)  # of all segments, the first steps come first
    assert torch.equal(expected.data[case.segments.last], lasts)
    for name in ("order", "places", "first", "last"):
        assert getattr(case.segments, name).device == CPU


def test_resets_of_first_steps_mean_nothing(case):
    first = case.x.shape[1] if case.batch_sizes is None else int(case.batch_sizes[0])
    more = case.resets.clone()
    more.view(-1)[:first] = True
    assert all(map(torch.equal, segments_of(more, case.batch_sizes, CPU)[:3], case.segments[:3]))
    assert not case.resets.view(-1)[:first].any()  # whose resets are not changed


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("with_hx", [False, True])
def test_a_run_is_that_of_each_segment_alone(case, directions, with_hx):
    """Of nn.LSTM; a direction of time has hx in the segment that it begins with."""
    torch.manual_seed(1)
    lstm = torch.nn.LSTM(4, 2, bidirectional=directions == 2)
    batch = len(case.sequences)
    hx = torch.randn(2, directions, batch, 2) if with_hx else None

    def run(rows, states):
        data = PackedSequence(rows, case.segments.batch_sizes)
        y, (h_n, c_n) = lstm(data, None if states is None else tuple(states))
        return y.data, h_n, c_n, [Pair(y.data, -y.data)]

    y, h_n, c_n, states = case.segments.run(run, case.x, hx, directions)
    assert type(states[0]) is Pair
    assert torch.equal(states[0].plus, y) and torch.equal(states[0].minus, -y)
    expected, ends = [], torch.zeros(2, directions, batch, 2)
    for b, own in enumerate(case.pieces):
        parts = []
        for k, piece in enumerate(own):
            given = torch.zeros(2, directions, 2)
            if with_hx and k == 0:
                given[:, 0] = hx[:, 0, b]
            if with_hx and directions == 2 and k == len(own) - 1:
                given[:, 1] = hx[:, 1, b]
            part, (h, c) = lstm(piece, (given[0], given[1]))
            parts.append(part)
            if k == len(own) - 1:
                ends[:, 0, b] = torch.stack([h[0], c[0]])
            if directions == 2 and k == 0:
                ends[:, 1, b] = torch.stack([h[1], c[1]])
        expected.append(torch.cat(parts))
    torch.testing.assert_close(y, case.rows(expected))
    torch.testing.assert_close((h_n, c_n), (ends[0], ends[1]))


def test_states_of_layers_and_directions_keep_their_places(case):
    """(L*D, B, F): each layer's directions are side by side."""
    batch = len(case.sequences)
    hx = torch.arange(1.0, 1 + 6 * batch).view(6, batch, 1)  # three layers
    seen = []

    def run(rows, states):
        seen.extend(states)
        return rows, states[0], states[1]

    _, h_n, c_n = case.segments.run(run, case.x, (hx, -hx), 2)
    (spread, negative), count = seen, case.segments.number
    assert spread.shape == (6, count, 1) and torch.equal(negative, -spread)
    assert torch.equal(spread[0::2, case.segments.first], hx[0::2])
    assert torch.equal(spread[1::2, case.segments.last], hx[1::2])
    assert spread.count_nonzero() == hx.numel()
    assert torch.equal(h_n[0::2], spread[0::2, case.segments.last]) and torch.equal(c_n, -h_n)
    assert torch.equal(h_n[1::2], spread[1::2, case.segments.first])


def test_a_zero_of_hx_is_no_product():
    """What no direction begins with is zero whatever hx is."""
    case = Case("dense")
    hx = torch.full((1, 3, 2), torch.inf)
    _, h_n, _ = case.segments.run(lambda rows, states: (rows, *states), case.x, (hx, hx), 1)
    assert torch.equal(h_n[0, :, 0], torch.tensor([0.0, 0.0, torch.inf]))  # only the last sequence is one segment


X = torch.zeros(6, 1, 3)


def test_how_rows_are_arranged():
    rows = Rows()
    assert arranged(X, rows, None, None, known=True) is rows
    resets = torch.zeros(6, 1, dtype=torch.bool)
    assert arranged(X, rows, resets, None, known=True) == Rows(resets=resets)
    side_by_side = arranged(X, rows, None, [0, 2, 6], known=True)
    assert side_by_side.resets is None and side_by_side.segments.number == 2
    assert side_by_side.segments.batch_sizes.tolist() == [2, 2, 1, 1]
    assert arranged(X, rows, None, [0, 6], known=True) is rows
    for options in (dict(known=False), dict(known=True, side_by_side=False)):
        for input, given, shape in ((X, rows, (6, 1)), (X.transpose(0, 1), Rows(batch_first=True), (1, 6))):
            one_by_one = arranged(input, given, None, [0, 2, 6], **options)
            assert one_by_one.segments is None and one_by_one.batch_first == given.batch_first
            assert one_by_one.resets.shape == shape
            assert one_by_one.resets.flatten().tolist() == [False, False, True, False, False, False]
    first = arranged(X.transpose(0, 1), Rows(batch_first=True), None, [0, 4, 6], known=True)
    assert first.segments.batch_sizes.tolist() == [2, 2, 1, 1]


def test_documents_are_checked_where_they_are_known():
    with pytest.raises(ValueError, match="from 0 to the input's 6 steps"):
        arranged(X, Rows(), None, [0, 7], known=True)
    with pytest.raises(ValueError, match="from 0 to the input's 6 steps"):
        arranged(X, Rows(), None, [0, 7], known=True, side_by_side=False)
    arranged(X, Rows(), None, [0, 7], known=False)
    with pytest.raises(ValueError, match="got a batch of 6"):
        arranged(X, Rows(batch_first=True), None, [0, 1], known=True)
    packed = Rows(batch_sizes=torch.ones(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="and not with packed rows"):
        arranged(X[:, 0], packed, None, [0, 6], known=True)
    with pytest.raises(ValueError, match="and not with resets"):
        arranged(X, Rows(), torch.zeros(6, 1, dtype=torch.bool), [0, 6], known=True)


def test_a_state_before_a_first_step_that_begins_anew():
    hx = torch.full((4, 3, 2), torch.inf), torch.ones(4, 3, 2)
    resets = torch.tensor([True, False, True])
    for directions in (1, 2):
        for state, got in zip(hx, without_reset(hx, resets, directions), strict=True):
            expected = state.clone()
            expected[::directions, resets] = 0.0  # against time it comes after the sequence
            assert torch.equal(got, expected)


def test_onnx_has_no_resets():
    refuse_in_onnx(None)
    with pytest.raises(RuntimeError, match="ONNX's LSTM operator has no resets"):
        refuse_in_onnx(torch.zeros(2, 1, dtype=torch.bool))


def test_the_default_device_does_not_matter(case):
    hx, resets = (torch.ones(2, 3, 1), torch.ones(2, 3, 1)), torch.tensor([True, False, True])
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)
    expected = without_reset(hx, resets, 2), resets_at(cu_seqlens, 6)
    with torch.device("meta"):
        got = segments_of(case.resets, case.batch_sizes, CPU)
        assert all(torch.equal(a, b) for a, b in zip(got, case.segments, strict=True) if isinstance(a, torch.Tensor))
        torch.testing.assert_close((without_reset(hx, resets, 2), resets_at(cu_seqlens, 6)), expected)


def test_resets_are_asked_for_in_the_dtype_of_cu_seqlens(monkeypatch):
    """Of two dtypes searchsorted would copy one."""
    seen, shipped = [], torch.searchsorted
    monkeypatch.setattr(torch, "searchsorted", lambda *args, **kw: seen.append(args[:2]) or shipped(*args, **kw))
    for dtype in (torch.int32, torch.int64):
        resets_at(torch.tensor([0, 2, 6], dtype=dtype), 6)
        assert [t.dtype for t in seen.pop()] == [dtype, dtype]
