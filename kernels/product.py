"""The recurrent product, rows @ weights, with the operands in the layout that the tensor cores want.

The A operand (BLOCK_B, K) are rows of h[t-1] forward and dgates[t+1] backward, the B operand (K, N) columns of W_hh.
The sum over K goes in chunks of BLOCK_K, and a chunk in SLICES parts, one for each warp, which are added at the end.
LAYER is a Layer of launch.py, TILE a plan's Tile.
"""

import triton
import triton.language as tl

from triton_lstm.kernels.inline import looks_by_thread, present
from triton_lstm.kernels.segments import begin_segment
from triton_lstm.planning.plan import Tile


@triton.constexpr_function
def fills_fragments(bits: int, tile: Tile) -> bool:
    """Whether the tile's slices of elements of so many bits have whole fragments of the tensor cores."""
    return tile.SLICES > 1 and bits <= 32 and tile.BLOCK_B >= 8 and tile.BLOCK_K * bits >= 512 * tile.SLICES


@triton.jit
def _in_fragments(k, LINES: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr):
    """Where the elements of chunk k of an operand with LINES rows (or columns) are, so that each warp has its slice's
    fragments of the tensor cores: 4 threads have 16 bytes each of a line, 8 lines a warp.

    Lines (n, 1) and terms of the sum (n, PIECE). Two dimensions: compilers differ in the order of threads in more.
    """
    SLICES: tl.constexpr = TILE.SLICES
    PART: tl.constexpr = TILE.BLOCK_K // SLICES
    PIECE: tl.constexpr = 512 // BITS
    place = tl.arange(0, PART // PIECE * LINES * SLICES)  # a piece of a part, 8 lines, a slice, a line
    line = place // (8 * SLICES) % (LINES // 8) * 8 + place % 8
    term = k * TILE.BLOCK_K + place // (LINES * SLICES) * PIECE + place // 8 % SLICES * PART
    return line[:, None], term[:, None] + tl.arange(0, PIECE)[None, :]


@triton.jit
def _from_fragments(x, LINES: tl.constexpr, TILE: tl.constexpr):
    """(SLICES, LINES, BLOCK_K/SLICES) from elements at `_in_fragments`; no thread has to give one to another.

    The terms of a part change their order, in both operands alike.
    """
    SLICES: tl.constexpr = TILE.SLICES
    PART: tl.constexpr = TILE.BLOCK_K // SLICES
    PIECE: tl.constexpr = x.shape[1]
    if PIECE == 32:  # in the two products that a thread's 8 elements of 16 bits are for, it has two pairs each
        x = tl.reshape(x, (PART // PIECE, LINES // 8, SLICES, 8, 4, 2, 2, 2))
        x = tl.permute(x, (2, 1, 3, 0, 5, 6, 4, 7))
    else:
        x = tl.reshape(x, (PART // PIECE, LINES // 8, SLICES, 8, 4, 2, 2))
        x = tl.permute(x, (2, 1, 3, 0, 5, 6, 4))
    return tl.reshape(x, (SLICES, LINES, PART))


@triton.jit
def load_weights(w_ptr, first_unit, k, K: tl.constexpr, LAYER: tl.constexpr, TILE: tl.constexpr):
    """Chunk k of the B operand: columns GATES * unit + gate of the program's units, from W_hh (4H, H) at w_ptr.

    (BLOCK_K, N), or (SLICES, BLOCK_K/SLICES, N); 0 outside.
    """
    H: tl.constexpr = LAYER.H
    GATES: tl.constexpr = LAYER.GATES
    N: tl.constexpr = GATES * TILE.BLOCK_H
    SLICES: tl.constexpr = TILE.SLICES
    BITS: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth
    FRAGMENTS: tl.constexpr = fills_fragments(BITS, TILE)
    if GATES == 1:  # neighbours in memory are units: through shared memory, in the order of the fragments
        place = tl.arange(0, TILE.BLOCK_K)
        part = place // SLICES
        if FRAGMENTS and BITS == 16:
            part = part // 32 * 32 + part // 2 % 4 * 8 + part // 16 % 2 * 4 + part // 8 % 2 * 2 + part % 2
        if FRAGMENTS and BITS == 32:
            part = part // 16 * 16 + part % 4 * 4 + part // 8 % 2 * 2 + part // 4 % 2
        term = (k * TILE.BLOCK_K + place % SLICES * (TILE.BLOCK_K // SLICES) + part).to(tl.int64)[:, None]
        unit = first_unit + tl.arange(0, N)[None, :]
        w = tl.load(w_ptr + term * H + unit, mask=(unit < H) & (term < K), other=0.0)
        if SLICES > 1:
            w = tl.permute(tl.reshape(w, (TILE.BLOCK_K // SLICES, SLICES, N)), (1, 0, 2))
        return w
    else:
        if FRAGMENTS:
            column, term = _in_fragments(k, N, BITS, TILE)
        else:
            column = tl.arange(0, N)[:, None]
            term = k * TILE.BLOCK_K + tl.arange(0, TILE.BLOCK_K)[None, :]
        unit = first_unit + column // GATES
        row = (column % GATES * H + unit).to(tl.int64)
        w = tl.load(w_ptr + row * H + term, mask=(unit < H) & (term < K), other=0.0)
        if FRAGMENTS:
            return tl.permute(_from_fragments(w, N, TILE), (0, 2, 1))
        elif SLICES > 1:
            return tl.permute(tl.reshape(w, (N, SLICES, TILE.BLOCK_K // SLICES)), (1, 2, 0))
        else:
            return tl.trans(w)


@triton.jit
def _load(ptrs, mask, LAYER: tl.constexpr):
    """What other programs write: past the L1 cache, and anew each time where the data is the flag."""
    VOLATILE: tl.constexpr = LAYER.EXCHANGE == "flag"
    return tl.load(ptrs, mask=mask, other=0.0, volatile=VOLATILE, cache_modifier="" if VOLATILE else ".cg")


@triton.jit
def _rows_at(ptr, live, segments, k, LAYER: tl.constexpr, TILE: tl.constexpr):
    """Pointers to chunk k of the A operand, and their mask: its first `live` rows are there, unless one begins a
    segment. segments: of segments.py's `as_bits`, or None."""
    K: tl.constexpr = LAYER.K // TILE.SPLITS
    if fills_fragments(ptr.dtype.element_ty.primitive_bitwidth, TILE):
        row, term = _in_fragments(k, TILE.BLOCK_B, ptr.dtype.element_ty.primitive_bitwidth, TILE)
    else:
        row = tl.arange(0, TILE.BLOCK_B)[:, None]
        term = k * TILE.BLOCK_K + tl.arange(0, TILE.BLOCK_K)[None, :]
    mask = row < live
    if segments is not None:
        mask = mask & ~begin_segment(segments, row)
    if K % TILE.BLOCK_K:
        mask = mask & (term < K)
    return ptr + row * (LAYER.D * LAYER.K) + term, mask


@triton.jit
def _as_operand(a, TILE: tl.constexpr):
    """(BLOCK_B, BLOCK_K), or (SLICES, BLOCK_B, BLOCK_K/SLICES), of elements at `_rows_at`."""
    SLICES: tl.constexpr = TILE.SLICES
    if fills_fragments(a.dtype.primitive_bitwidth, TILE):
        return _from_fragments(a, TILE.BLOCK_B, TILE)
    elif SLICES > 1:
        return tl.permute(tl.reshape(a, (TILE.BLOCK_B, SLICES, TILE.BLOCK_K // SLICES)), (1, 0, 2))
    else:
        return a


@triton.jit
def load_rows(ptr, live, segments, k, LAYER: tl.constexpr, TILE: tl.constexpr):
    """Chunk k of the A operand as `tl.dot` wants it; 0, which is never the sentinel, for rows that are not there."""
    ptrs, mask = _rows_at(ptr, live, segments, k, LAYER, TILE)
    return _as_operand(_load(ptrs, mask, LAYER), TILE)


@triton.jit
def load_present_rows(ptr, live, segments, k, there, LAYER: tl.constexpr, TILE: tl.constexpr):
    """The same; each thread waits for what is not there yet, unless all is known to be `there`."""
    if looks_by_thread(LAYER):
        ptrs, mask = _rows_at(ptr, live, segments, k, LAYER, TILE)
        return _as_operand(present(_load(ptrs, mask, LAYER), ptrs, there, LAYER, TILE), TILE)
    else:
        return load_rows(ptr, live, segments, k, LAYER, TILE)


@triton.jit
def _halve(acc):
    """Adds the second half of the first dimension to the first half, element by element within a thread."""
    HALF: tl.constexpr = acc.shape[0] // 2
    a, b = tl.split(tl.permute(tl.reshape(acc, (2, HALF, acc.shape[1], acc.shape[2], acc.shape[3])), (1, 2, 3, 4, 0)))
    return a + b


@triton.jit
def _add_slices(acc, LAYER: tl.constexpr, TILE: tl.constexpr):
    """(SLICES, BLOCK_B, N), or (BLOCK_B, N), with the gates of a unit side by side -> (GATES, BLOCK_B, N/GATES)."""
    SLICES: tl.constexpr = TILE.SLICES
    GATES: tl.constexpr = LAYER.GATES
    BLOCK_B: tl.constexpr = TILE.BLOCK_B
    BLOCK_H: tl.constexpr = TILE.BLOCK_H
    acc = tl.reshape(acc, (SLICES, BLOCK_B, BLOCK_H, GATES))
    acc = tl.permute(acc, (0, 3, 1, 2))  # the one change of layout
    if SLICES >= 8:
        acc = _halve(acc)
    if SLICES >= 4:
        acc = _halve(acc)
    if SLICES >= 2:
        acc = _halve(acc)
    return tl.reshape(acc, (GATES, BLOCK_B, BLOCK_H))


@triton.jit
def multiply(rows_ptr, live, segments, weights, w_ptr, first_unit, there, LAYER: tl.constexpr, TILE: tl.constexpr):
    """rows @ weights, (GATES, BLOCK_B, BLOCK_H). live, segments: of `_rows_at`; there: as for `load_present_rows`."""
    SLICES: tl.constexpr = TILE.SLICES
    BLOCK_B: tl.constexpr = TILE.BLOCK_B
    N: tl.constexpr = LAYER.GATES * TILE.BLOCK_H
    BITS: tl.constexpr = rows_ptr.dtype.element_ty.primitive_bitwidth
    K: tl.constexpr = LAYER.K // TILE.SPLITS
    CHUNKS: tl.constexpr = (K + TILE.BLOCK_K - 1) // TILE.BLOCK_K
    PRESENT: tl.constexpr = looks_by_thread(LAYER)
    if SLICES > 1:
        acc = tl.zeros((SLICES, BLOCK_B, N), LAYER.ACC)
    else:
        acc = tl.zeros((BLOCK_B, N), LAYER.ACC)
    if TILE.RESIDENT:
        # So many chunks are on their way at once: up to 64 registers of a slice's warp, or 24 KiB of shared memory
        IN_FLIGHT: tl.constexpr = 8192 * SLICES if SLICES > 1 else 24576
        FIT: tl.constexpr = IN_FLIGHT * 8 // (BLOCK_B * TILE.BLOCK_K * BITS)
        ROOM: tl.constexpr = FIT > 1 and BLOCK_B < 64 and LAYER.PRECISION != "tf32x3"  # of registers, for more than one
        AHEAD: tl.constexpr = FIT if ROOM else 1
        rows = ()
        for k in tl.static_range(CHUNKS + AHEAD):
            if k >= AHEAD:
                a = rows[k - AHEAD]
                if PRESENT:  # not right after the load, which would be waited for alone
                    a = _as_operand(present(a[0], a[1], there, LAYER, TILE), TILE)
                acc = tl.dot(a, weights[k - AHEAD], acc, input_precision=LAYER.PRECISION, out_dtype=LAYER.ACC)
            if k < CHUNKS:
                if PRESENT:
                    ptrs, mask = _rows_at(rows_ptr, live, segments, k, LAYER, TILE)
                    rows = rows + ((_load(ptrs, mask, LAYER), ptrs),)
                else:
                    rows = rows + (load_rows(rows_ptr, live, segments, k, LAYER, TILE),)
    else:
        for k in range(CHUNKS):
            a = load_present_rows(rows_ptr, live, segments, k, there, LAYER, TILE)
            w = load_weights(w_ptr, first_unit, k, K, LAYER, TILE)
            acc = tl.dot(a, w, acc, input_precision=LAYER.PRECISION, out_dtype=LAYER.ACC)
    return _add_slices(acc, LAYER, TILE)
