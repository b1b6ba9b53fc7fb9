"""Matrix products and the layouts of their operands: fragments in registers, and wgmma's tiles in shared memory.

Layouts are those of the PTX manual, "Matrix Fragments for mma" and "Matrix Descriptor Format", for operands of 4 or 2
bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from .numbers import F32, U16, U32, bits_of, from_bf16, read_tf32

Array = np.ndarray
# By type: bytes of an element, and what a tensor core reads of its bits
OPERANDS: dict[str, tuple[int, Callable[[Array], Array]]] = {
    "bf16": (2, lambda bits: from_bf16(bits).view(F32)),
    "f16": (2, lambda bits: bits.view(np.float16).astype(F32)),
    "tf32": (4, lambda bits: read_tf32(bits).view(F32)),
}
# The types and K of the shapes m16n8kK that exist
MMA = {("bf16", 8), ("bf16", 16), ("f16", 8), ("f16", 16), ("tf32", 4), ("tf32", 8)}


@functools.cache
def places(operand: str, size: int, k: int) -> Array:
    """Where element (row, column) of a fragment is in its registers, flat over (register, lane, part of a register).

    operand: "a" (16, k), "b" (k, 8) or "c" (16, 8). size: bytes of an element.
    """
    parts = 4 // size
    registers = {"a": k // (2 * parts), "b": k // (4 * parts), "c": 4}[operand]
    register, lane, part = np.unravel_index(np.arange(registers * 32 * parts), (registers, 32, parts))
    if operand == "a":
        row, column = lane // 4 + 8 * (register & 1), lane % 4 * parts + part + 4 * parts * (register >> 1)
        shape = 16, k
    elif operand == "b":
        row, column = lane % 4 * parts + part + 4 * parts * register, lane // 4
        shape = k, 8
    else:
        row, column = lane // 4 + 8 * (register >> 1), lane % 4 * 2 + (register & 1)
        shape = 16, 8
    table = np.full(shape, -1)
    table[row, column] = np.arange(row.size)
    assert (table >= 0).all()
    return table


def matrices(registers: list[Array], operand: str, size: int, k: int) -> Array:
    """The matrices (warps, rows, columns) whose fragments are in registers of whole warps; elements are bits."""
    by_warp = np.stack([x.reshape(-1, 32) for x in registers], 1)  # (warps, registers, 32)
    elements = np.ascontiguousarray(by_warp).view(U16 if size == 2 else U32).reshape(len(by_warp), -1)
    return elements[:, places(operand, size, k)]


def fragments(c: Array) -> list[Array]:
    """The registers of the accumulators (warps, 16, 8), float32."""
    order = np.argsort(places("c", 4, 8), axis=None)
    flat = bits_of(np.ascontiguousarray(c, F32)).reshape(len(c), -1)[:, order]
    return [np.ascontiguousarray(flat[:, 32 * r : 32 * r + 32]).ravel() for r in range(4)]


def mma(kind: str, k: int, a: list[Array], b: list[Array], c: list[Array]) -> list[Array]:
    """mma.sync m16n8kK with float32 accumulators: c + a @ b for every warp."""
    size, read = OPERANDS[kind]
    x, y = read(matrices(a, "a", size, k)), read(matrices(b, "b", size, k))
    return fragments(x @ y + matrices(c, "c", 4, 8).view(F32))


def mma_f64(a: Array, b: Array, c: list[Array]) -> list[Array]:
    """mma.sync m8n8k4 in float64."""
    x = a.view(np.float64).reshape(-1, 8, 4)
    y = b.view(np.float64).reshape(-1, 8, 4).transpose(0, 2, 1)
    z = np.stack(c, 1).view(np.float64).reshape(-1, 8, 8)
    d = (x @ y + z).reshape(-1, 2).view(np.uint64)
    return [np.ascontiguousarray(d[:, 0]), np.ascontiguousarray(d[:, 1])]


# ldmatrix and stmatrix: 8x8 matrices of 16 bits, a register each
LANE = np.arange(32)


def from_rows(rows: Array, transposed: bool) -> Array:
    """A register (warps, 32) of a matrix's rows (warps, 8, 8): lane i has two neighbours of row, or column, i // 4."""
    matrix = rows.transpose(0, 2, 1) if transposed else rows
    return np.ascontiguousarray(matrix.reshape(-1, 32, 2)).view(U32).reshape(-1, 32)


def to_rows(register: Array, transposed: bool) -> Array:
    """The rows (warps, 8, 8) of a matrix in a register (warps, 32)."""
    matrix = np.ascontiguousarray(register).view(U16).reshape(-1, 8, 8)
    return matrix.transpose(0, 2, 1) if transposed else matrix


# wgmma
SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}  # by the descriptor's mode: bytes of a swizzled row
DESCRIPTOR = 3 << 62 | 0x3FFF << 32 | 0x3FFF << 16 | 0x3FFF  # its bits that are known: all but the base offset


def tile_addresses(descriptor: int, rows: int, k: int, size: int, transposed: bool) -> Array:
    """Addresses (rows, k) in shared memory of an operand of wgmma. rows: M of A, or N of B.

    transposed: rows are contiguous in memory ("MN-major") instead of k.
    """
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = descriptor >> 62
    width = SWIZZLES[mode]
    row, column = np.arange(rows)[:, None], np.arange(k)[None, :]
    if transposed:
        per = width // size
        leading, stride = (leading, stride) if mode else (stride, leading)
        at = row // per * leading + column // 8 * stride + column % 8 * width + row % per * size
    elif mode:
        at = row // 8 * stride + row % 8 * width + column * size
    else:
        at = row // 8 * stride + row % 8 * 16 + column * size // 16 * leading + column * size % 16
    at = at + start
    chunk = {16: 0, 128: 7, 64: 3, 32: 1}[width]
    return at ^ ((at >> 7 & chunk) << 4)


def wgmma_a(registers: list[Array], size: int) -> Array:
    """A (64, k) of one warp group, whose four warps hold 16 rows each."""
    k = 32 // size
    return matrices(registers, "a", size, k).reshape(64, k)


def wgmma_accumulators(d: Array) -> list[Array]:
    """The registers (128 threads) of D (64, n), float32."""
    thread = np.arange(128)
    out = []
    for i in range(d.shape[1] // 2):
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
        out.append(d[row, 8 * (i // 4) + 2 * (thread % 4) + i % 2])
    return out
