"""Which rows begin a segment: the state before them is zero."""

import triton
import triton.language as tl

from triton_lstm.kernels.steps import rows_of


@triton.jit
def load_resets(resets_ptr, starts_ptr, t, length, row, B, BLOCK_B: tl.constexpr):
    """(BLOCK_B,): 1 for each row of step `t`, from `row` on, that begins a segment; none in the first step.

    resets_ptr (N,) uint8. length: of the batch tile's longest sequence.
    """
    offs_b = tl.arange(0, BLOCK_B)
    t = tl.cast(t, tl.int64)
    start, count = rows_of(starts_ptr, t, B)
    count = tl.where((t > 0) & (t < length), count, 0)
    return tl.load(resets_ptr + start + row + offs_b, mask=row + offs_b < count, other=0)


@triton.jit
def as_bits(resets):
    """The rows that begin a segment as bits of a scalar: each operand can have its mask in a layout of its own."""
    BLOCK_B: tl.constexpr = resets.shape[0]
    tl.static_assert(BLOCK_B <= 64, "a row has a bit")
    WORD: tl.constexpr = tl.uint32 if BLOCK_B <= 32 else tl.uint64
    return tl.xor_sum((resets != 0).to(WORD) << tl.arange(0, BLOCK_B).to(WORD))


@triton.jit
def begin_segment(segments, rows):
    """Whether `rows` of a batch tile begin a segment; segments: `as_bits`."""
    return ((segments >> rows.to(segments.dtype)) & 1) != 0


@triton.jit
def all_begin(segments, live, BLOCK_B: tl.constexpr):
    """Whether all of a batch tile's first `live` rows begin a segment; the first one, if there are none."""
    WORD: tl.constexpr = segments.dtype
    SIZE: tl.constexpr = WORD.primitive_bitwidth
    rest = (SIZE - tl.minimum(tl.maximum(live, 1), BLOCK_B)).to(WORD)
    return segments == tl.full((), 2**SIZE - 1, WORD) >> rest
