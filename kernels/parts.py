"""BPTT over two axes: programs split the sum of the recurrent product, and send each other their parts of it.

A program multiplies a split of the columns of dgates[t+1] with the weights of a block of BLOCK_H units. The block's
SPLITS programs own BLOCK_H/SPLITS units of it each: a program gets their parts from the others, and adds them.

A word is a float32 and the number of its step, 64 bits that are stored and seen together: no value stands for "not
yet", and every NaN passes. The words of two steps suffice: a program writes its parts of step n, in the place of those
of n-2, after it has added the parts of n-1. These came from all programs of its block, each of which had read its own
parts of n-2 before it sent those of n-1.

BLOCK_B * BLOCK_H/SPLITS is no less than the program's threads: others would have copies of words, from another look.
LAYER is a Layer of launch.py, TILE a plan's Tile.
"""

import torch
import triton
import triton.language as tl

from triton_lstm.planning.plan import Plan


def parts_for(plan: Plan, D: int, B: int, hidden_size: int, device: torch.device) -> torch.Tensor | None:
    """Memory for the parts of one launch, int64 (D, batch tiles, 2, programs, SPLITS, BLOCK_B, own units) or None."""
    if plan.splits == 1:
        return None
    tile = (plan.grid(hidden_size)[0], plan.splits, plan.block_b, plan.block_h // plan.splits)
    return torch.empty(D, -(-B // plan.block_b), 2, *tile, dtype=torch.int64, device=device)


@triton.jit
def await_parts(own, number, n, LAYER: tl.constexpr, TILE: tl.constexpr):
    """Waits for one word of every split, the last of its part; `n` looks are spent. It promises nothing of the other
    words, of which a look has many, and each warp looks by itself, so nothing that it sees may leave this function."""
    SIZE: tl.constexpr = TILE.BLOCK_B * TILE.BLOCK_H // TILE.SPLITS
    LAST: tl.constexpr = LAYER.SPIN_LIMIT if LAYER.SPIN_LIMIT else 1
    word = own + tl.arange(0, 32) % TILE.SPLITS * SIZE + SIZE - 1
    while n < LAST:
        oldest = tl.min((tl.load(word, volatile=True) >> 32).to(tl.int32))
        n = tl.where(oldest < number, n + (1 if LAYER.SPIN_LIMIT else 0), LAST)


@triton.jit
def add_parts(parts_ptr, tile, part, step, gave_up, LAYER: tl.constexpr, TILE: tl.constexpr):
    """Tells a program's part (BLOCK_B, BLOCK_H) of a step, waits for the others'; returns the sum of all parts of the
    own units (BLOCK_B, BLOCK_H/SPLITS), and whether it gave up.

    tile: which of both directions' batch tiles. gave_up: as for `recurrent_product`.
    """
    SPLITS: tl.constexpr = TILE.SPLITS
    BLOCK_B: tl.constexpr = TILE.BLOCK_B
    OWN: tl.constexpr = TILE.BLOCK_H // SPLITS
    LAST: tl.constexpr = LAYER.SPIN_LIMIT if LAYER.SPIN_LIMIT else 1
    number = step + 1  # 0 is what the memory is filled with
    program = tl.program_id(0)
    split = program % SPLITS
    ring = parts_ptr + tl.cast((2 * tile + step % 2) * tl.num_programs(0), tl.int64) * (SPLITS * BLOCK_B * OWN)
    row = tl.arange(0, BLOCK_B)[:, None] * OWN
    unit = tl.arange(0, TILE.BLOCK_H)[None, :]
    owner = program - split + unit // OWN
    word = tl.cast(number, tl.int64) << 32 | (part.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    tl.store(ring + (owner * SPLITS + split) * (BLOCK_B * OWN) + row + unit % OWN, word)
    own = ring + program * (SPLITS * BLOCK_B * OWN)
    await_parts(own, number, gave_up * LAST, LAYER, TILE)
    own += row + tl.arange(0, OWN)[None, :]
    total = tl.zeros((BLOCK_B, OWN), tl.float32)
    late = 0
    n = gave_up * (LAST - 1)
    while n < LAST:
        total = tl.zeros((BLOCK_B, OWN), tl.float32)
        oldest = tl.full((BLOCK_B, OWN), number, tl.int32)  # a word's number only grows
        for k in tl.static_range(SPLITS):  # always in the same order
            seen = tl.load(own + k * (BLOCK_B * OWN), volatile=True)
            total += seen.to(tl.int32).to(tl.float32, bitcast=True)
            oldest = tl.minimum(oldest, (seen >> 32).to(tl.int32))
        late = (tl.min(oldest) != number).to(tl.int32)
        n = tl.where(late != 0, n + (1 if LAYER.SPIN_LIMIT else 0), LAST)
    return total, late
