"""Which rows of the data belong to a time step."""

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
