"""How the programs of one batch tile see each other's rows, and the recurrent product that waits for them.

A program's A operand (BLOCK_B, K) is `h[t-1]` forward and `dgates[t+1]` backward; every program writes its own columns.
LAYER is a Layer of launch.py, TILE a plan's Tile.

flag     The data is the flag. The buffer starts full of a NaN that no store makes; where the product holds a NaN the
         reader looks at the tile itself, and only a product of a tile already seen complete is final.
barrier  A counter per batch tile that only grows: `arrive` after a step's stores, `wait` before the next one's loads.
"""

import torch
import triton
import triton.language as tl

# By element size: a NaN that no conversion makes, as a signed integer (a compare with the unsigned one is never true).
SENTINEL = {2: -91, 4: -5920859, 8: -2914093876533851}
INT_TYPE = {2: (torch.int16, tl.int16), 4: (torch.int32, tl.int32), 8: (torch.int64, tl.int64)}


def fill_with_sentinel(buffer: torch.Tensor) -> None:
    """Marks every element of a contiguous floating-point `buffer` as not yet written."""
    size = buffer.element_size()
    buffer.view(INT_TYPE[size][0]).fill_(SENTINEL[size])


def make_ready(exchange: str, buffer: torch.Tensor, counter: torch.Tensor | None) -> None:
    """Prepares an exchange for a launch: a `buffer` marked as unwritten, a `counter` at zero."""
    if exchange == "flag":
        fill_with_sentinel(buffer)
    if counter is not None:
        counter.zero_()


@triton.jit
def store_unlike_sentinel(ptrs, value, mask, LAYER: tl.constexpr):
    """Stores `value` in the pointers' dtype; a NaN with the sentinel's very bits becomes the NaN beside it."""
    bits = value.to(ptrs.dtype.element_ty).to(LAYER.INT, bitcast=True)
    bits = tl.where(bits == LAYER.SENTINEL, LAYER.SENTINEL + 1, bits)
    tl.store(ptrs, bits.to(ptrs.dtype.element_ty, bitcast=True), mask=mask)


@triton.jit
def arrive(counter_ptr):
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, target, gave_up, LAYER: tl.constexpr):
    """Returns 1 if the limit ran out first (a limit of 0 never does), else 0."""
    LAST: tl.constexpr = LAYER.SPIN_LIMIT if LAYER.SPIN_LIMIT else 1
    short = 0
    n = gave_up * (LAST - 1)
    while n < LAST:
        short = (tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target).to(tl.int32)
        n = tl.where(short != 0, n + (1 if LAYER.SPIN_LIMIT else 0), LAST)
    tl.debug_barrier()
    return short


@triton.jit
def load_weights(w_cols, mask_n, k, K: tl.constexpr, STRIDE_K: tl.constexpr, TILE: tl.constexpr):
    """Rows k*BLOCK_K and up of the B operand, whose column n starts at w_cols[n].

    (BLOCK_K, N), or (SLICES, BLOCK_K/SLICES, N); 0 outside.
    """
    left = K - k * TILE.BLOCK_K
    w_cols += tl.cast(k, tl.int64) * (TILE.BLOCK_K * STRIDE_K)
    if TILE.SLICES > 1:
        PART: tl.constexpr = TILE.BLOCK_K // TILE.SLICES
        row = tl.arange(0, TILE.SLICES)[:, None, None] * PART + tl.arange(0, PART)[None, :, None]
        return tl.load(w_cols[None, None, :] + row * STRIDE_K, mask=mask_n[None, None, :] & (row < left), other=0.0)
    else:
        row = tl.arange(0, TILE.BLOCK_K)[:, None]
        return tl.load(w_cols[None, :] + row * STRIDE_K, mask=mask_n[None, :] & (row < left), other=0.0)


@triton.jit
def _load_rows(
    ptr,
    mask_b,
    k,
    K: tl.constexpr,
    SLICES: tl.constexpr,
    VOLATILE: tl.constexpr,
    LAYER: tl.constexpr,
    TILE: tl.constexpr,
):
    """Columns k*BLOCK_K and up of the A operand.

    (BLOCK_B, BLOCK_K), or (SLICES, BLOCK_B, BLOCK_K/SLICES); 0 outside, which is never the sentinel.
    """
    ROW_STRIDE: tl.constexpr = LAYER.D * K
    offs_b = tl.arange(0, TILE.BLOCK_B)
    CACHE: tl.constexpr = "" if VOLATILE else ".cg"
    if SLICES > 1:
        PART: tl.constexpr = TILE.BLOCK_K // SLICES
        col = k * TILE.BLOCK_K + tl.arange(0, SLICES)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
        return tl.load(
            ptr + offs_b[None, :, None] * ROW_STRIDE + col,
            mask=mask_b[None, :, None] & (col < K),
            other=0.0,
            volatile=VOLATILE,
            cache_modifier=CACHE,
        )
    else:
        col = k * TILE.BLOCK_K + tl.arange(0, TILE.BLOCK_K)[None, :]
        return tl.load(
            ptr + offs_b[:, None] * ROW_STRIDE + col,
            mask=mask_b[:, None] & (col < K),
            other=0.0,
            volatile=VOLATILE,
            cache_modifier=CACHE,
        )


@triton.jit
def _multiply(
    rows_ptr,
    mask_b,
    weights,
    w_cols,
    mask_n,
    K: tl.constexpr,
    STRIDE_K: tl.constexpr,
    LAYER: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_B: tl.constexpr = TILE.BLOCK_B
    SLICES: tl.constexpr = TILE.SLICES
    N: tl.constexpr = w_cols.shape[0]
    VOLATILE: tl.constexpr = LAYER.EXCHANGE == "flag"
    CHUNKS: tl.constexpr = (K + TILE.BLOCK_K - 1) // TILE.BLOCK_K
    if SLICES > 1:
        acc = tl.zeros((SLICES, BLOCK_B, N), LAYER.ACC)
    else:
        acc = tl.zeros((BLOCK_B, N), LAYER.ACC)
    if TILE.RESIDENT:
        for k in tl.static_range(CHUNKS):
            a = _load_rows(rows_ptr, mask_b, k, K, SLICES, VOLATILE, LAYER, TILE)
            acc = tl.dot(a, weights[k], acc, input_precision=LAYER.PRECISION, out_dtype=LAYER.ACC)
    else:
        for k in range(CHUNKS):
            a = _load_rows(rows_ptr, mask_b, k, K, SLICES, VOLATILE, LAYER, TILE)
            w = load_weights(w_cols, mask_n, k, K, STRIDE_K, TILE)
            acc = tl.dot(a, w, acc, input_precision=LAYER.PRECISION, out_dtype=LAYER.ACC)
    if SLICES > 1:
        return tl.sum(acc, 0)
    else:
        return acc


@triton.jit
def missing(rows_ptr, mask_b, K: tl.constexpr, LAYER: tl.constexpr, TILE: tl.constexpr):
    """1 if an element of the A operand is still the sentinel, else 0."""
    found = 0
    for k in range((K + TILE.BLOCK_K - 1) // TILE.BLOCK_K):
        # In the product's own layout: another thread may still see the sentinel that this one no longer sees
        bits = _load_rows(rows_ptr, mask_b, k, K, TILE.SLICES, True, LAYER, TILE).to(LAYER.INT, bitcast=True)
        found |= tl.max((bits == LAYER.SENTINEL).to(tl.int32))
    return found


@triton.jit
def recurrent_product(
    rows_ptr,
    mask_b,
    weights,
    w_cols,
    mask_n,
    counter_ptr,
    target,
    gave_up,
    K: tl.constexpr,
    STRIDE_K: tl.constexpr,
    LAYER: tl.constexpr,
    TILE: tl.constexpr,
):
    """Waits until the rows are complete and returns (rows @ weights, 1 if the wait ran out of SPIN_LIMIT else 0).

    target: how many arrivals complete the rows; 0 means that they were there before the launch.
    gave_up: 1 after a wait that ran out, and nothing is waited for any more; else 0.
    """
    if LAYER.EXCHANGE == "barrier":
        late = wait(counter_ptr, target, gave_up, LAYER)
        product = _multiply(rows_ptr, mask_b, weights, w_cols, mask_n, K, STRIDE_K, LAYER, TILE)
    else:
        LAST: tl.constexpr = LAYER.SPIN_LIMIT if LAYER.SPIN_LIMIT else 1
        BLOCK_B: tl.constexpr = TILE.BLOCK_B
        N: tl.constexpr = w_cols.shape[0]
        product = tl.zeros((BLOCK_B, N), LAYER.ACC)
        complete = (target == 0).to(tl.int32)
        late = 0
        n = gave_up * (LAST - 1)
        while n < LAST:  # one scalar decides and all that is carried is read afterwards: other forms crash Triton 3.6
            product = _multiply(rows_ptr, mask_b, weights, w_cols, mask_n, K, STRIDE_K, LAYER, TILE)
            late = 0
            if complete == 0:
                late = tl.max((product != product).to(tl.int32))
                if late != 0:
                    complete = 1 - missing(rows_ptr, mask_b, K, LAYER, TILE)
            n = tl.where(late != 0, n + (1 if LAYER.SPIN_LIMIT else 0), LAST)
    return product, late
