"""Number formats and arithmetic with the hardware's rounding, on arrays of bits (unsigned integers).

Results that are not a number have the hardware's bits, 0x7fffffff in float32 and 0x7fff in 16 bits: the exchange
between programs depends on it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray
U16, U32, U64 = np.uint16, np.uint32, np.uint64
F16, F32, F64 = np.float16, np.float32, np.float64
FLOAT = {2: F16, 4: F32, 8: F64}
UNSIGNED = {1: np.uint8, 2: U16, 4: U32, 8: U64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
NAN = {2: U16(0x7FFF), 4: U32(0x7FFFFFFF), 8: U64(0x7FF8000000000000)}


def bits_of(x: Array) -> Array:
    """The bits of floats; of each NaN the hardware's."""
    bits = x.view(UNSIGNED[x.itemsize])
    odd = np.isnan(x)
    if np.count_nonzero(odd):
        bits = np.where(odd, NAN[x.itemsize], bits)
    return bits


def floats(operation: Callable[..., Array], size: int) -> Callable[..., Array]:
    """An operation on floats of so many bytes, on bits."""
    kind = FLOAT[size]
    return lambda *operands: bits_of(operation(*(x.view(kind) for x in operands)))


def widened(kind: str, operation: Callable[..., Array]) -> Callable[..., Array]:
    """An operation on a type of FORMATS, or on the pairs of it in each register, on bits."""
    read, write = FORMATS[kind]

    def run(*operands: Array) -> Array:
        whole = np.broadcast_arrays(*operands)
        return write(operation(*(read(np.ascontiguousarray(x)) for x in whole))).view(operands[0].dtype)

    return run


# What bits are in a wider format, whose sums and products can be rounded once more without a trace; and its bits
FORMATS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "f32x2": (lambda x: x.view(F32), lambda x: bits_of(x)),
    "f16": (lambda x: x.view(F16).astype(F64), lambda x: bits_of(x.astype(F16))),
    "bf16": (lambda x: from_bf16(x.view(U16)).view(F32), lambda x: to_bf16(bits_of(x))),
}
FORMATS |= {"f16x2": FORMATS["f16"], "bf16x2": FORMATS["bf16"]}


# Fused multiply-add: the exact product and sum, rounded once


def _odd_sum(a: Array, b: Array) -> Array:
    """a + b of float64, rounded to odd: rounding that to fewer digits is rounding once (Boldo, Melquiond 2008)."""
    s = a + b
    t = s - a
    error = (a - (s - t)) + (b - t)
    bits = s.view(np.int64)
    inexact = np.isfinite(s) & (error != 0) & (bits & 1 == 0)
    if not np.count_nonzero(inexact):
        return s
    away = (error > 0) == (s > 0)
    return np.where(inexact, np.where(away, bits + 1, bits - 1), bits).view(F64)


def fma16(a: Array, b: Array, c: Array) -> Array:
    """float16 in float64, which holds the product exactly."""
    return _odd_sum(a * b, c)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """float32; float64 holds the product exactly."""
    return _odd_sum(a.astype(F64) * b, c.astype(F64)).astype(F32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """float64, as the sum of two exact pairs (Boldo, Melquiond 2008); rounded twice near over- and underflow."""
    high = a * b
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    low = ((a1 * b1 - high) + a1 * b2 + a2 * b1) + a2 * b2
    sum_high, sum_low = _two_sum(c, low)
    top, rest = _two_sum(high, sum_high)
    exact = top + _odd_sum(rest, sum_low)
    return np.where(np.isfinite(low), exact, high + c)


def _halves(x: Array) -> tuple[Array, Array]:
    big = x * F64(2**27 + 1)
    high = big - (big - x)
    return high, x - high


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


# Conversions


def from_bf16(bits: Array) -> Array:
    return bits.astype(U32) << U32(16)


def to_bf16(bits: Array) -> Array:
    """Nearest, ties to even."""
    rounded = ((bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
    return np.where(np.isnan(bits.view(F32)), NAN[2], rounded)


def from_f16(bits: Array) -> Array:
    return bits_of(bits.view(F16).astype(F32))


def to_f16(bits: Array) -> Array:
    """Nearest, ties to even."""
    return bits_of(bits.view(F32).astype(F16))


def to_tf32(bits: Array) -> Array:
    """Nearest, ties away from zero: 10 bits of the fraction are left."""
    rounded = (bits + U32(0x1000)) & U32(0xFFFFE000)
    x = bits.view(F32)
    return np.where(np.isfinite(x), rounded, np.where(np.isnan(x), NAN[4], bits))


def read_tf32(bits: Array) -> Array:
    """What a tensor core sees of 32 bits."""
    return bits & U32(0xFFFFE000)


def to_integer(x: Array, kind: type) -> Array:
    """Towards zero, limited to what there is; NaN is 0, or the topmost bit if either type has 64 bits."""
    limits = np.iinfo(kind)
    whole = np.trunc(x.astype(F64))
    beyond = [whole <= float(limits.min), whole >= float(limits.max), np.isnan(x)]  # float64 rounds the largest up
    nan = (limits.min or 1 << limits.bits - 1) if 64 in (limits.bits, 8 * x.itemsize) else 0
    inside = np.where(np.any(beyond, 0), 0.0, whole).astype(kind)
    return np.select(beyond, [kind(limits.min), kind(limits.max), kind(nan)], inside)


# Comparisons


def minimum(a: Array, b: Array) -> Array:
    """The smaller one, -0 below 0; of a NaN and a number, the number."""
    return np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))


def maximum(a: Array, b: Array) -> Array:
    return np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))


def nan_minimum(a: Array, b: Array) -> Array:
    """minimum, but NaN if either is."""
    return np.where(np.isnan(a) | np.isnan(b), FLOAT[a.itemsize](np.nan), minimum(a, b))


def nan_maximum(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a) | np.isnan(b), FLOAT[a.itemsize](np.nan), maximum(a, b))


# Integers


def divide(a: Array, b: Array) -> Array:
    """Towards zero; all bits set for a division by 0, whose result PTX leaves open."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient += ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(zero, ~a.dtype.type(0), quotient)


def remainder(a: Array, b: Array) -> Array:
    """a - b * divide(a, b); a for a division by 0, whose result PTX leaves open."""
    return a - np.where(b == 0, b, b * divide(a, b))


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of a product."""
    size = a.itemsize
    if size < 8:
        wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[2 * size]
        return ((a.astype(wide) * b.astype(wide)) >> wide(8 * size)).astype(a.dtype)
    exact = [(int(x) * int(y)) >> 64 for x, y in np.broadcast(a, b)]
    return np.array(exact, a.dtype)


def shift_left(a: Array, by: Array) -> Array:
    """0 from the width on."""
    width = 8 * a.itemsize
    return np.where(by < width, a << np.minimum(by, width - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: Array, by: Array) -> Array:
    """The sign, or 0, from the width on."""
    width = 8 * a.itemsize
    if a.dtype.kind == "i":
        return a >> np.minimum(by, width - 1).astype(a.dtype)
    return np.where(by < width, a >> np.minimum(by, width - 1).astype(a.dtype), a.dtype.type(0))


def bit_field(a: Array, position: Array, length: Array) -> Array:
    """bfe: `length` bits from `position` on, with the sign of the topmost for signed integers."""
    width = 8 * a.itemsize
    above = U32(width) - np.minimum(length & U32(0xFF), U32(width))  # bits of the result that are not the field's
    return shift_right(shift_left(shift_right(a, position & U32(0xFF)), above), above)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four bytes of the eight of b:a, each chosen by four bits, of which the highest copies the sign."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    source = np.ascontiguousarray(np.stack([a, b], -1)).view(np.uint8)
    out = np.empty((len(a), 4), np.uint8)
    for k in range(4):
        choice = (selector >> U32(4 * k)) & U32(15)
        byte = source[np.arange(len(a)), choice & 7]
        out[:, k] = np.where(choice & 8, np.where(byte & 0x80, 0xFF, 0), byte)
    return out.view(U32).ravel()
