"""How the programs of one batch tile see each other's rows, and the recurrent product that waits for them.

A program's rows are `h[t-1]` forward and `dgates[t+1]` backward, the A operand of product.py; every program writes its
own columns. A counter per batch tile, which only grows, says how many have stored theirs: `arrive` after a step's
stores, `wait` before the next one's loads.

barrier  `arrive` releases what was stored before it, and `wait` acquires it: the loads see it.
flag     The data is the flag. The buffer starts full of a NaN that no store makes; what is loaded and still is that NaN
         is loaded again. The counter promises nothing, so that nobody waits until stores are seen, which takes a trip
         through L2: it only says when it is worth looking.
"""

import torch
import triton
import triton.language as tl

from triton_lstm.kernels.inline import await_count, looks_by_thread, waits_by_thread
from triton_lstm.kernels.product import load_rows, multiply
from triton_lstm.kernels.segments import all_begin

SENTINEL = -1  # all bits set, a NaN that no conversion makes but 32-bit arithmetic may; as an integer of any size
# All warps of all programs look at a counter, more than a line of L2 can bear: it has copies, each in a line of its own
COPIES, LINE = tl.constexpr(4), tl.constexpr(32)
INT_TYPE = {2: (torch.int16, tl.int16), 4: (torch.int32, tl.int32), 8: (torch.int64, tl.int64)}


def fill_with_sentinel(buffer: torch.Tensor) -> None:
    """Marks every element of a contiguous floating-point `buffer` as not yet written."""
    size = buffer.element_size()
    buffer.view(INT_TYPE[size][0]).fill_(SENTINEL)


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
    bits = tl.where(bits == LAYER.SENTINEL, LAYER.SENTINEL - 1, bits)
    tl.store(ptrs, bits.to(ptrs.dtype.element_ty, bitcast=True), mask=mask)


@triton.jit
def store_rows(ptrs, value, mask, LAYER: tl.constexpr):
    """Stores what other programs may wait for, in the pointers' dtype."""
    if LAYER.EXCHANGE == "flag":
        store_unlike_sentinel(ptrs, value, mask, LAYER)
    else:
        tl.store(ptrs, value.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def counter_at(signals_ptr, tile):
    """The counter of one of both directions' batch tiles."""
    return signals_ptr + LINE * (1 + COPIES * tile)


@triton.jit
def arrive(counter_ptr, LAYER: tl.constexpr):
    ORDERING: tl.constexpr = "release" if LAYER.EXCHANGE == "barrier" else "relaxed"
    tl.debug_barrier()
    if LAYER.BACKEND == "hip":  # where the compiler forgets what a tensor's atomics release
        tl.atomic_add(counter_ptr, 1, sem=ORDERING, scope="gpu")
    else:
        tl.atomic_add(counter_ptr + tl.arange(0, COPIES) * LINE, 1, sem=ORDERING, scope="gpu")


@triton.jit
def wait(counter_ptr, target, gave_up, LAYER: tl.constexpr):
    """Returns 1 if the limit ran out first (a limit of 0 never does), else 0."""
    ORDERING: tl.constexpr = "acquire" if LAYER.EXCHANGE == "barrier" else "relaxed"
    if LAYER.BACKEND != "hip":
        counter_ptr += tl.program_id(0) % COPIES * LINE
    short = 0
    if waits_by_thread(LAYER):
        await_count(counter_ptr, target, ORDERING)
    else:
        LAST: tl.constexpr = LAYER.SPIN_LIMIT if LAYER.SPIN_LIMIT else 1
        n = gave_up * (LAST - 1)
        while n < LAST:
            short = (tl.atomic_add(counter_ptr, 0, sem=ORDERING, scope="gpu") < target).to(tl.int32)
            n = tl.where(short != 0, n + (1 if LAYER.SPIN_LIMIT else 0), LAST)
        tl.debug_barrier()
    return short


@triton.jit
def missing(rows_ptr, live, segments, LAYER: tl.constexpr, TILE: tl.constexpr):
    """1 if an element of the A operand is still the sentinel, else 0."""
    found = 0
    for k in range((LAYER.K // TILE.SPLITS + TILE.BLOCK_K - 1) // TILE.BLOCK_K):
        # In the product's own layout: another thread may still see the sentinel that this one no longer sees
        bits = load_rows(rows_ptr, live, segments, k, LAYER, TILE).to(LAYER.INT, bitcast=True)
        found |= tl.max((bits == LAYER.SENTINEL).to(tl.int32))
    return found


@triton.jit
def await_rows(rows_ptr, live, segments, counter_ptr, target, gave_up, LAYER: tl.constexpr, TILE: tl.constexpr):
    """Waits until the rows are complete, or likely to be where `present` looks again. Returns whether it gave up.

    target: how many arrivals complete the rows; 0 means that they were there before the launch, or that all are zero.
    gave_up: 1 after a wait that ran out of SPIN_LIMIT, and nothing is waited for any more; else 0. As what is returned.
    """
    late = wait(counter_ptr, target, gave_up, LAYER)
    if LAYER.EXCHANGE == "flag" and not looks_by_thread(LAYER):
        LAST: tl.constexpr = LAYER.SPIN_LIMIT if LAYER.SPIN_LIMIT else 1
        n = tl.where(target == 0, LAST, (gave_up | late) * (LAST - 1))
        absent = 0
        while n < LAST:
            absent = missing(rows_ptr, live, segments, LAYER, TILE)
            n = tl.where(absent != 0, n + (1 if LAYER.SPIN_LIMIT else 0), LAST)
        late |= absent
    return late


@triton.jit
def recurrent_product(
    rows_ptr,
    live,
    segments,
    weights,
    w_ptr,
    first_unit,
    counter_ptr,
    target,
    gave_up,
    LAYER: tl.constexpr,
    TILE: tl.constexpr,
):
    """rows @ weights, (GATES, BLOCK_B, BLOCK_H), of complete rows; and whether the wait for them gave up.

    rows_ptr, w_ptr: of the program's split of the sum. live: how many rows there are. segments: which of them begin a
    segment (see segments.py) and count as zeros, or None; nobody waits where all do. target, gave_up: see
    `await_rows`.
    """
    if segments is not None:
        target = tl.where(all_begin(segments, live, TILE.BLOCK_B), 0, target)
    late = await_rows(rows_ptr, live, segments, counter_ptr, target, gave_up, LAYER, TILE)
    return multiply(rows_ptr, live, segments, weights, w_ptr, first_unit, target == 0, LAYER, TILE), late
