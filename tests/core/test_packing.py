"""The indexing of rows, against each sequence separately."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from triton_lstm.core import packing

LENGTHS = [4, 3, 3, 1]
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


def test_starts_and_lengths():
    starts, lengths = packing.starts_and_lengths(torch.tensor([4, 3, 3, 1]), torch.device("cpu"))
    assert starts.tolist() == [0, 4, 7, 10, 11, 11] and starts.dtype == torch.int64
    assert lengths.tolist() == [4, 3, 3, 1] and lengths.dtype == torch.int32
    assert packing.batch_sizes_of(starts) == [4, 3, 3, 1] and packing.batch_sizes_of(None) is None


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


@pytest.mark.parametrize("against_time", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_processed_just_before(layout, against_time):
    """A matmul of the pairs equals that of each sequence; adding changes the previous row and no other."""
    later, earlier = Rows(layout, 1), Rows(layout, 1)
    where = later.starts, later.lengths
    expected = torch.zeros(2, 2)
    now, before = (slice(None, -1), slice(1, None)) if against_time else (slice(1, None), slice(None, -1))
    for a, b in zip(later.sequences, earlier.sequences, strict=True):
        expected += a[now].t() @ b[before]
    untouched = earlier.data.clone()
    a, b = packing.successions(later.data, earlier.data, *where, against_time=against_time)
    torch.testing.assert_close(a.t() @ b, expected)
    assert torch.equal(earlier.data, untouched)
    packing.add_to_predecessors(earlier.data, later.data, *where, against_time=against_time)
    for a, b in zip(later.sequences, earlier.sequences, strict=True):
        b[before] += a[now]
    assert torch.equal(earlier.data, earlier.again(earlier.sequences))
