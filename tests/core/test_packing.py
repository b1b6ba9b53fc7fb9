"""The indexing of rows, against each sequence separately."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from triton_lstm.core import packing

LENGTHS = [5, 3, 3, 1]
LAYOUTS = ["dense", "packed"]


class Rows:
    """Random data of two features per direction, with starts and lengths, and the steps of each sequence, (T, F)."""

    def __init__(self, layout: str, directions: int) -> None:
        lengths = LENGTHS if layout == "packed" else [4, 4, 4]
        self.sequences = [torch.randn(n, 2 * directions) for n in lengths]
        self.starts = self.lengths = None
        if layout == "packed":
            batch_sizes = pack_sequence(self.sequences).batch_sizes
            self.starts, self.lengths = packing.starts_and_lengths(batch_sizes, torch.device("cpu"))
        self.data = self.again(self.sequences)

    def again(self, sequences: list[torch.Tensor]) -> torch.Tensor:
        """The rows of other sequences as long as these."""
        return torch.stack(sequences, 1) if self.starts is None else pack_sequence(sequences).data


def test_states_side_by_side():
    of_each = torch.randn(2, 3, 4)
    assert torch.equal(packing.side_by_side(of_each), torch.cat([of_each[0], of_each[1]], 1))


def test_starts_and_lengths():
    starts, lengths = packing.starts_and_lengths(torch.tensor([4, 3, 3, 1, 1]), torch.device("cpu"))
    assert starts.tolist() == [0, 4, 7, 10, 11, 12, 12] and starts.dtype == torch.int64
    assert lengths.tolist() == [5, 3, 3, 1] and lengths.dtype == torch.int32
    assert packing.batch_sizes_of(starts) == [4, 3, 3, 1, 1] and packing.batch_sizes_of(None) is None


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_and_last_rows_are_copies(layout, directions):
    """Modifying or keeping them does not affect the rest."""
    rows = Rows(layout, directions)
    cases = (packing.first_rows, (0, -1), lambda parts: torch.cat(parts, -1)), (packing.last_rows, (-1, 0), torch.stack)
    for find, ends, join in cases:
        found = find(rows.data, directions, rows.starts, rows.lengths)
        parts = [torch.stack([s[end, 2 * d : 2 * d + 2] for s in rows.sequences]) for d, end in enumerate(ends)]
        assert torch.equal(found, join(parts[:directions]))
        assert found.untyped_storage().data_ptr() != rows.data.untyped_storage().data_ptr()
        assert not found._is_view()


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adding_to_the_first_rows(layout, directions):
    rows = Rows(layout, directions)
    added = torch.randn(len(rows.sequences), 2 * directions)
    packing.add_to_first_rows(rows.data, added, directions, rows.starts, rows.lengths)
    for sequence, own in zip(rows.sequences, added, strict=True):
        sequence[0, :2] += own[:2]
        sequence[-1, 2:] += own[2:]
    assert torch.equal(rows.data, rows.again(rows.sequences))


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_first_rows_changes_nothing_in_place(layout, directions):
    rows = Rows(layout, directions)
    added, before = torch.randn(len(rows.sequences), 2 * directions), rows.data.clone()
    got = packing.with_first_rows(rows.data, added, directions, rows.starts, rows.lengths)
    assert torch.equal(rows.data, before)
    packing.add_to_first_rows(rows.data, added, directions, rows.starts, rows.lengths)
    assert torch.equal(got, rows.data)


@pytest.mark.parametrize("against_time", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adding_to_the_last_rows(layout, against_time):
    """In the dtype of the data."""
    rows = Rows(layout, 1)
    added = torch.randn(len(rows.sequences), 2, dtype=torch.float64)
    packing.add_to_last_rows(rows.data, added, rows.starts, against_time=against_time)
    for sequence, own in zip(rows.sequences, added.float(), strict=True):
        sequence[0 if against_time else -1] += own
    torch.testing.assert_close(rows.data, rows.again(rows.sequences))


@pytest.mark.parametrize("marked", [{}, {0: [2], 1: [0], 2: [1, 2]}], ids=["whole", "resets"])
@pytest.mark.parametrize("against_time", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_processed_just_before(layout, against_time, marked):
    """A matmul of the pairs equals that of each sequence; adding changes the previous row and no other.

    marked: each sequence's steps that begin a segment, for which a first step counts anyway.
    """
    later, earlier = Rows(layout, 1), Rows(layout, 1)
    marks = [torch.tensor([t in marked.get(k, ()) for t in range(len(s))]) for k, s in enumerate(later.sequences)]
    where = later.starts, later.lengths, later.again(marks) if marked else None
    expected, untouched = torch.zeros(2, 2), earlier.data.clone()
    pairs = []  # of steps, for each sequence
    for k, mark in enumerate(marks):
        steps = [(t - 1, t) if against_time else (t, t - 1) for t in range(1, len(mark)) if not mark[t]]
        pairs.append(steps)
        for now, before in steps:
            expected += later.sequences[k][now][:, None] * earlier.sequences[k][before]
    a, b = packing.successions(later.data, earlier.data, *where, against_time=against_time)
    torch.testing.assert_close(a.t() @ b, expected)
    assert torch.equal(earlier.data, untouched)
    packing.add_to_predecessors(earlier.data, later.data, *where, against_time=against_time)
    for a, b, steps in zip(later.sequences, earlier.sequences, pairs, strict=True):
        for now, before in steps:
            b[before] += a[now]
    assert torch.equal(earlier.data, earlier.again(earlier.sequences))


@pytest.mark.parametrize("against_time", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_crosses_a_reset_not_even_nan(layout, against_time):
    rows = Rows(layout, 1)
    where = rows.starts, rows.lengths, torch.ones(rows.data.shape[:-1], dtype=torch.bool)
    nan = torch.full_like(rows.data, torch.nan)
    _, before = packing.successions(rows.data, nan, *where, against_time=against_time)
    assert not before.any()
    untouched = rows.data.clone()
    packing.add_to_predecessors(rows.data, nan, *where, against_time=against_time)
    assert torch.equal(rows.data, untouched)


def test_which_rows_pytorchs_lstm_takes():
    sizes, resets = torch.tensor([2, 1]), torch.zeros(2, 1, dtype=torch.bool)
    assert packing.DENSE.plain and packing.DENSE_BATCH_FIRST.plain and not packing.DENSE.transposed
    for field in (dict(batch_sizes=sizes), dict(resets=resets), dict(segments="some")):
        assert not packing.Rows(**field).plain
    assert packing.DENSE_BATCH_FIRST.transposed and not packing.Rows(True, batch_sizes=sizes).transposed


@pytest.mark.parametrize(
    "kind, capturing, refused", [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_a_capture_is_refused(kind, capturing, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph") if refused else nullcontext():
        packing.refuse_capture(torch.device(kind))


def test_stacked_is_no_view():
    parts = [torch.randn(2, 3) for _ in range(2)]
    assert torch.equal(packing.stacked(parts), torch.stack(parts)) and not packing.stacked(parts)._is_view()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_default_device_does_not_matter(layout):
    """Indices are made where the data are."""

    def results():
        torch.manual_seed(0)
        with torch.device("cpu"):
            rows = Rows(layout, 2)
            added, data = torch.randn(len(rows.sequences), 4), rows.data.clone()
        where = rows.starts, rows.lengths
        yield packing.first_rows(data, 2, *where)
        yield packing.last_rows(data, 2, *where)
        yield packing.with_first_rows(data, added, 2, *where)
        packing.add_to_first_rows(data, added, 2, *where)
        for against_time in (False, True):
            packing.add_to_last_rows(data, added, rows.starts, against_time=against_time)
            packing.add_to_predecessors(data, data.clone(), *where, against_time=against_time)
            yield from packing.successions(data, data, *where, against_time=against_time)
        yield data
        if layout == "packed":
            batch_sizes = rows.starts.diff()[:-1]
            yield from packing.starts_and_lengths(batch_sizes, data.device)

    expected = list(results())
    with torch.device("meta"):
        got = list(results())
    assert all(map(torch.equal, got, expected))
