"""Which rows of the data belong to a time step, and which of them begin a segment: their state before it is zero."""

import triton
import triton.language as tl


@triton.jit
def rows_of(starts_ptr, t, B):
    """The first row of step `t`, and how many there are; for t < 0 nothing that may be looked at."""
    if starts_ptr is None:
        return t * B, tl.cast(B, tl.int64)
    else:
        start = tl.load(starts_ptr + tl.maximum(t, 0))
        return start, tl.load(starts_ptr + tl.maximum(t, 0) + 1) - start


@triton.jit
def load_resets(resets_ptr, starts_ptr, t, length, row, B, BLOCK_B: tl.constexpr):
    """(BLOCK_B,): 1 for each row of step `t`, from `row` on, that begins a segment; none in the first step.

    resets_ptr (N,) uint8. length: of the batch tile's longest sequence.
    """
    offs_b = tl.arange(0, BLOCK_B)
    start, count = rows_of(starts_ptr, t, B)
    count = tl.where((t > 0) & (t < length), count, 0)
    return tl.load(resets_ptr + start + row + offs_b, mask=row + offs_b < count, other=0)


@triton.jit
def as_bits(resets):
    """The rows that begin a segment as bits of a scalar: each operand can have its mask in a layout of its own."""
    BLOCK_B: tl.constexpr = resets.shape[0]
    tl.static_assert(BLOCK_B <= 64, "a row has a bit")
    WORD: tl.constexpr = tl.uint32 if BLOCK_B <= 32 else tl.uint64
    return tl.xor_sum(resets.to(WORD) << tl.arange(0, BLOCK_B).to(WORD))


@triton.jit
def begin_segment(segments, rows):
    """Whether `rows` of a batch tile begin a segment; segments: `as_bits`."""
    return ((segments >> rows.to(segments.dtype)) & 1) != 0


@triton.jit
def all_begin(segments, live, BLOCK_B: tl.constexpr):
    """Whether all of a batch tile's first `live` rows begin a segment; there is one at least."""
    WORD: tl.constexpr = segments.dtype
    SIZE: tl.constexpr = WORD.primitive_bitwidth
    rest = (SIZE - tl.minimum(live, BLOCK_B)).to(WORD)
    return segments == tl.full((), 2**SIZE - 1, WORD) >> rest
