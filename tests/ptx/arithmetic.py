"""Instructions that compute: integers, floats and bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import numbers
from .decoder import Decoder, Family, Operands, Run, size_of
from .numbers import FLOAT, SIGNED, UNSIGNED, floats

Array = np.ndarray

FLOATS = ("f32", "f64", "f16", "bf16", "f32x2", "f16x2", "bf16x2")
INTEGERS = tuple(f"{kind}{bits}" for kind in "su" for bits in (16, 32, 64))
BITS = ("b16", "b32", "b64")


def typed(kind: str, function: Callable[..., Array]) -> Callable[..., Array]:
    """A function of numbers of a type, as one of bits."""
    if kind in numbers.FORMATS:
        return numbers.widened(kind, function)
    size = size_of(kind)
    if kind[0] == "f":
        return floats(function, size)
    if kind[0] == "s":
        signed = SIGNED[size]
        return lambda *xs: unsigned(function(*(x.view(signed) for x in xs)))
    return function


def unsigned(x: Array) -> Array:
    """The same bits."""
    return x.view(UNSIGNED[x.itemsize])


def view_of(kind: str) -> Callable[[Array], Array]:
    """The numbers that bits of a type are."""
    if kind in numbers.FORMATS:
        return numbers.FORMATS[kind][0]
    view = {"f": FLOAT, "s": SIGNED}.get(kind[0], UNSIGNED)[size_of(kind)]
    return lambda x: x.view(view)


def arithmetic(function: Callable[..., Array]) -> Family:
    """add and sub of integers (wrapping) and of floats (to nearest), mul of floats."""

    def family(d: Decoder, o: Operands) -> Run:
        kind = d.parts[-1]
        if d.parts[-2] == "f32" and d.parts[0] != "mul":  # add.rn.f32.bf16: a bf16 and a float32
            d.only("rn", "f32", kind)
            widen = {"bf16": numbers.from_bf16, "f16": numbers.from_f16}[kind]
            mixed = floats(function, 4)
            return d.compute(lambda a, b: mixed(widen(a), b), o, 4, 2, 4)
        size = size_of(kind)
        if kind in INTEGERS:
            d.only(kind)
            return d.compute(function, o, size, size, size)  # of either sign they wrap alike
        d.require(kind in FLOATS)
        d.only("rn", kind)
        return d.compute(typed(kind, function), o, size, size, size)

    return family


def _product(d: Decoder) -> tuple[Callable[[Array, Array], Array], int, int]:
    """Of mul and mad of integers: the product, its size, and that of its factors."""
    part, kind = d.parts[1:]
    d.require(kind in INTEGERS)
    size = size_of(kind)
    if part == "lo":
        return np.multiply, size, size
    if part == "hi":
        return typed(kind, numbers.multiply_high), size, size
    d.require(part == "wide")
    wide = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * size]
    return typed(kind, lambda a, b: a.astype(wide) * b.astype(wide)), 2 * size, size


def multiply(d: Decoder, o: Operands) -> Run:
    if d.parts[-1] in FLOATS:
        return arithmetic(np.multiply)(d, o)
    product, large, size = _product(d)
    return d.compute(product, o, large, size, size)


def multiply_add(d: Decoder, o: Operands) -> Run:
    product, large, size = _product(d)
    return d.compute(lambda a, b, c: product(a, b) + c, o, large, size, size, large)


def fused(d: Decoder, o: Operands) -> Run:
    exact = {
        "f32": numbers.fma32,
        "f32x2": numbers.fma32,
        "f64": numbers.fma64,
        "f16": numbers.fma16,
        "f16x2": numbers.fma16,
    }
    _, rounding, kind = d.parts
    d.require(rounding == "rn")
    size = size_of(kind)
    return d.compute(typed(kind, exact[kind]), o, size, size, size, size)


def division(d: Decoder, o: Operands) -> Run:
    """Floats exactly rounded, also where `full` and `approx` allow 2 units in the last place."""
    _, *mode, kind = d.parts
    size = size_of(kind)
    known = {"f32": (["rn"], ["full"], ["approx"]), "f64": (["rn"],)}
    d.require(mode in known[kind] if kind in known else kind in INTEGERS and not mode)
    return d.compute(typed(kind, np.divide if kind[0] == "f" else numbers.divide), o, size, size, size)


def remainder(d: Decoder, o: Operands) -> Run:
    kind = d.parts[-1]
    d.only(kind)
    d.require(kind in INTEGERS)
    size = size_of(kind)
    return d.compute(typed(kind, numbers.remainder), o, size, size, size)


def without_subnormals(x: Array) -> Array:
    """As .ftz has it: subnormal float32 numbers become zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def unary(function: Callable[[Array], Array], *forms: str) -> Family:
    """A function of one operand. forms: what follows the opcode's first part."""

    def family(d: Decoder, o: Operands) -> Run:
        d.require(".".join(d.parts[1:]) in forms)
        kind = d.parts[-1]
        size = size_of(kind)
        if "ftz" in d.parts:
            return d.compute(typed(kind, lambda x: without_subnormals(function(without_subnormals(x)))), o, size, size)
        return d.compute(typed(kind, function), o, size, size)

    return family


def extreme(plain: Callable[..., Array], with_nan: Callable[..., Array], whole: Callable[..., Array]) -> Family:
    def family(d: Decoder, o: Operands) -> Run:
        kind = d.parts[-1]
        if kind in ("u16x2", "s16x2"):  # of both halves of a register
            d.only(kind)
            halves = typed(kind.removesuffix("x2"), whole)
            split = lambda x: np.ascontiguousarray(x).view(np.uint16).reshape(-1, 2)  # noqa: E731
            return d.compute(lambda a, b: halves(split(a), split(b)).view(np.uint32).ravel(), o, 4, 4, 4)
        size = size_of(kind)
        d.require(kind in FLOATS + INTEGERS)
        d.only(kind, *(("NaN",) if kind in FLOATS else ()))
        function = typed(kind, whole if kind in INTEGERS else with_nan if "NaN" in d.parts else plain)
        if kind == "f32" and len(o) == 4:
            return d.compute(lambda a, b, c: function(function(a, b), c), o, 4, 4, 4, 4)
        return d.compute(function, o, size, size, size)

    return family


def bitwise(function: Callable[..., Array], count: int = 2) -> Family:
    def family(d: Decoder, o: Operands) -> Run:
        kind = d.parts[-1]
        d.only(kind)
        d.require(kind in ("pred", *BITS))
        return d.compute(function, o, size_of(kind), *[size_of(kind)] * count)

    return family


def shift(function: Callable[..., Array], operator: Callable[..., Array], *kinds: str) -> Family:
    """operator: the same for fewer bits than there are."""

    def family(d: Decoder, o: Operands) -> Run:
        kind = d.parts[-1]
        d.only(kind)
        d.require(kind in kinds)
        size, read = size_of(kind), view_of(kind)
        if o[2].isdecimal() and int(o[2]) < 8 * size:  # the usual case
            by = read(np.array([int(o[2])], UNSIGNED[size]))
            return d.compute(lambda a, _: unsigned(operator(read(a), by)), o, size, size, 4)
        return d.compute(lambda a, n: unsigned(function(read(a), n)), o, size, size, 4)

    return family


def bit_field(d: Decoder, o: Operands) -> Run:
    kind = d.parts[-1]
    d.only(kind)
    d.require(kind in ("u32", "s32", "u64", "s64"))
    read, size = view_of(kind), size_of(kind)
    return d.compute(lambda a, *field: unsigned(numbers.bit_field(read(a), *field)), o, size, size, 4, 4)


def permute(d: Decoder, o: Operands) -> Run:
    d.only("b32")
    return d.compute(numbers.permute_bytes, o, 4, 4, 4, 4)
