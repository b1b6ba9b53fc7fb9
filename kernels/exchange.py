"""How the programs of one batch tile see each other's rows, and the recurrent product that waits for them.

A program's rows are `h[t-1]` forward and `dgates[t+1]` backward, the A operand of product.py; every program writes its
own columns. LAYER is a Layer of launch.py, TILE a plan's Tile.

flag     The data is the flag. The buffer starts full of a NaN that no store makes. A reader waits for one value of
         every program, then multiplies until the product holds no NaN; where one stays, it looks at the tile itself,
         and only a product of a tile already seen complete is final.
barrier  A counter per batch tile that only grows: `arrive` after a step's stores, `wait` before the next one's loads.
"""

import torch
import triton
import triton.language as tl

from triton_lstm.kernels.product import load_rows, multiply

# By element size: a NaN that no conversion makes, as a signed integer (a compare with the unsigned one is never true).
SENTINEL = {2: -91, 4: -5920859, 8: -2914093876533851}
INT_TYPE = {2: (torch.int16, tl.int16), 4: (torch.int32, tl.int32), 8: (torch.int64, tl.int64)}


def fill_with_sentinel(buffer: torch.Tensor) -> None:
    """Marks every element of a contiguous floating-point `buffer` as not yet written."""
    size = buffer.element_size()
    buffer.view(INT_TYPE[size][0]).fill_(SENTINEL[size])


def make_ready(exchange: str, buffer: torch.Tensor, *zeroed: torch.Tensor | None) -> None:
    """Prepares an exchange for a launch: a `buffer` marked as unwritten; counters and parts, if there are any, at 0."""
    if exchange == "flag":
        fill_with_sentinel(buffer)
    for tensor in zeroed:
        if tensor is not None:
            tensor.zero_()


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
def await_rows(rows_ptr, n, LAYER: tl.constexpr, TILE: tl.constexpr):
    """Waits for one element of every program's columns, the last that it stores of the first row; `n` looks are spent.

    That promises nothing of its other elements, but most looks at all of them would be in vain without it. Up to 32
    elements every warp looks at by itself, so nothing that it sees may leave this function; of fewer than 32, parts of
    a warp would have copies of their own, and part.
    """
    K: tl.constexpr = LAYER.K // TILE.SPLITS
    OWN: tl.constexpr = TILE.BLOCK_H // TILE.SPLITS
    UNITS: tl.constexpr = LAYER.H if LAYER.H < K else K
    PROGRAMS: tl.constexpr = (UNITS + OWN - 1) // OWN
    LAST: tl.constexpr = LAYER.SPIN_LIMIT if LAYER.SPIN_LIMIT else 1
    LOOKED_AT: tl.constexpr = triton.next_power_of_2(PROGRAMS) if PROGRAMS > 32 else 32
    unit = tl.arange(0, LOOKED_AT) * OWN + OWN - 1
    element = rows_ptr + (K - UNITS) + tl.minimum(unit, UNITS - 1)
    while n < LAST:
        absent = tl.load(element, volatile=True).to(LAYER.INT, bitcast=True) == LAYER.SENTINEL
        n = tl.where(tl.max(absent.to(tl.int32)) != 0, n + (1 if LAYER.SPIN_LIMIT else 0), LAST)


@triton.jit
def has_nan(product):
    """1 if there is a NaN in (GATES, BLOCK_B, BLOCK_H): a row was not complete, or holds an honest one; else 0."""
    total = tl.sum(product, 0)
    return tl.max((total != total).to(tl.int32))


@triton.jit
def missing(rows_ptr, live, LAYER: tl.constexpr, TILE: tl.constexpr):
    """1 if an element of the A operand is still the sentinel, else 0."""
    found = 0
    for k in range((LAYER.K // TILE.SPLITS + TILE.BLOCK_K - 1) // TILE.BLOCK_K):
        # In the product's own layout: another thread may still see the sentinel that this one no longer sees
        bits = load_rows(rows_ptr, live, k, LAYER, TILE).to(LAYER.INT, bitcast=True)
        found |= tl.max((bits == LAYER.SENTINEL).to(tl.int32))
    return found


@triton.jit
def recurrent_product(
    rows_ptr,
    live,
    weights,
    w_ptr,
    first_unit,
    counter_ptr,
    target,
    gave_up,
    LAYER: tl.constexpr,
    TILE: tl.constexpr,
):
    """Waits until the rows are complete; returns rows @ weights, (GATES, BLOCK_B, BLOCK_H), and whether it gave up.

    rows_ptr, w_ptr: of the program's split of the sum.
    target: how many arrivals complete the rows; 0 means that they were there before the launch.
    gave_up: 1 after a wait that ran out of SPIN_LIMIT, and nothing is waited for any more; else 0. As what is returned.
    """
    if LAYER.EXCHANGE == "barrier":
        late = wait(counter_ptr, target, gave_up, LAYER)
        product = multiply(rows_ptr, live, weights, w_ptr, first_unit, LAYER, TILE)
    else:
        LAST: tl.constexpr = LAYER.SPIN_LIMIT if LAYER.SPIN_LIMIT else 1
        FINAL: tl.constexpr = LAYER.SPIN_LIMIT - 1  # the last look's number
        GATES: tl.constexpr = LAYER.GATES
        BLOCK_B: tl.constexpr = TILE.BLOCK_B
        BLOCK_H: tl.constexpr = TILE.BLOCK_H
        product = tl.zeros((GATES, BLOCK_B, BLOCK_H), LAYER.ACC)
        complete = (target == 0).to(tl.int32)
        late = 0
        looks = 0
        n = gave_up * (LAST - 1)
        await_rows(rows_ptr, tl.maximum(complete, gave_up) * LAST, LAYER, TILE)
        while n < LAST:  # one scalar decides and all that is carried is read afterwards: other forms crash Triton 3.6
            product = multiply(rows_ptr, live, weights, w_ptr, first_unit, LAYER, TILE)
            late = 0
            if complete == 0:
                late = has_nan(product)
                looks += 1
                # A look at the tile costs more than a product: only where a NaN stays is it likely to be an honest one
                if (late != 0) & ((looks % 4 == 0) | (n == FINAL)):
                    complete = 1 - missing(rows_ptr, live, LAYER, TILE)
            n = tl.where(late != 0, n + (1 - complete if LAYER.SPIN_LIMIT else 0), LAST)
    return product, late
