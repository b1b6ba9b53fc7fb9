"""Comparisons, selections, moves and conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import numbers
from .arithmetic import BITS, FLOATS, INTEGERS, unsigned, view_of
from .decoder import Decoder, Operands, Run, size_of
from .numbers import FLOAT, SIGNED, U32, UNSIGNED

Array = np.ndarray

COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


# With a NaN eq is false and equ true, and so on; num: no NaN, nan: one at least
COMPARE_FLOATS: dict[str, Callable[[Array, Array], Array]] = {
    **{name: COMPARE[name] for name in ("eq", "lt", "le", "gt", "ge")},
    "ne": lambda a, b: (a < b) | (a > b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}


def set_predicate(d: Decoder, o: Operands) -> Run:
    comparison, kind = d.parts[1:]
    size, read = size_of(kind), view_of(kind)
    d.require(kind in ("f16", "bf16", "f32", "f64", *BITS, *INTEGERS))
    signs = {"b": ("eq", "ne"), "s": ("eq", "ne", "lt", "le", "gt", "ge")}
    d.require(kind in FLOATS or comparison in signs.get(kind[0], COMPARE))
    compare = (COMPARE_FLOATS if kind in FLOATS else COMPARE)[comparison]
    return d.compute(lambda a, b: compare(read(a), read(b)), o, 0, size, size)


def select(d: Decoder, o: Operands) -> Run:
    kind = d.parts[-1]
    d.only(kind)
    d.require(kind in ("f32", "f64", *BITS, *INTEGERS))
    size = size_of(kind)
    return d.compute(lambda a, b, p: np.where(p, a, b), o, size, size, size, 0)


def move(d: Decoder, o: Operands) -> Run:
    kind = d.parts[-1]
    d.only(kind)
    d.require(kind in ("pred", "f32", "f64", *BITS, *INTEGERS))
    size = size_of(kind)
    to, source = o
    if to[0] == "{":
        return _unpack(d, d.vector(to), d.source(source, size), size)
    if source[0] == "{":
        names, whole = d.vector(source), UNSIGNED[size]
        sources = [d.source(name, _part(d, size, len(names))) for name in names]

        def pack(*xs: Array) -> Array:
            return np.ascontiguousarray(np.stack(np.broadcast_arrays(*xs), 1)).view(whole).ravel()

        return d.assign(pack, d.destination(to, size), *sources)
    return d.compute(lambda a: a, o, size, size)


def _unpack(d: Decoder, names: list[str], source: int, size: int) -> Run:
    part, count = _part(d, size, len(names)), len(names)
    targets = [(k, d.destination(name, part)) for k, name in enumerate(names) if name != "_"]
    kept = UNSIGNED[part]

    def unpack(group: Any) -> None:
        r = group.registers
        parts = np.ascontiguousarray(r[source]).view(kept)
        for k, target in targets:
            r[target] = np.ascontiguousarray(parts[k::count])

    return unpack


def _part(d: Decoder, size: int, count: int) -> int:
    """Bytes of each of so many parts of a register."""
    d.require(count in (2, 4) and size >= 2 * count)
    return size // count


# Conversions by the parts of the opcode; d = bf16x2 of two float32, the first of which is the upper half
CONVERSIONS: dict[str, Callable[..., Array]] = {
    "rn.bf16x2.f32": lambda high, low: numbers.to_bf16(high).astype(U32) << U32(16) | numbers.to_bf16(low),
    "rn.f16x2.f32": lambda high, low: numbers.to_f16(high).astype(U32) << U32(16) | numbers.to_f16(low),
    "rn.bf16.f32": numbers.to_bf16,
    "f32.bf16": numbers.from_bf16,
    "rn.f16.f32": numbers.to_f16,
    "f32.f16": numbers.from_f16,
    "rna.tf32.f32": numbers.to_tf32,
    "f64.f32": lambda x: numbers.bits_of(x.view(np.float32).astype(np.float64)),
    "rn.f32.f64": lambda x: numbers.bits_of(x.view(np.float64).astype(np.float32)),
}


def convert(d: Decoder, o: Operands) -> Run:
    to, source = d.parts[-2:]
    modifiers = d.parts[1:-2]
    small, large = size_of(source), size_of(to)
    if function := CONVERSIONS.get(".".join(d.parts[1:])):
        return d.compute(function, o, large, *[small] * (2 if to in numbers.FORMATS and to.endswith("x2") else 1))
    if {to, source} <= {*INTEGERS, "s8", "u8"}:
        return _convert_integers(d, o, to, source)
    read = view_of(source)
    if source in INTEGERS and to in ("f32", "f64"):
        d.require(modifiers == ["rn"])
        kind = FLOAT[large]
        return d.compute(lambda x: unsigned(read(x).astype(kind)), o, large, small)
    d.require(to in INTEGERS and source in ("f32", "f64") and modifiers == ["rzi"])
    whole = (SIGNED if to[0] == "s" else UNSIGNED)[large]
    return d.compute(lambda x: unsigned(numbers.to_integer(read(x), whole)), o, large, small)


def _convert_integers(d: Decoder, o: Operands, to: str, source: str) -> Run:
    """Registers may be wider than the types: the source's lower bits count, the result is extended by its own sign."""
    d.require(len(d.parts) == 3)
    target_name, source_name = o
    held = d.source(source_name, None) if source_name[0] == "%" else d.source(source_name, size_of(source))
    target = d.destination(target_name, None)
    d.require(d.widths[held] >= size_of(source) and d.widths[target] >= size_of(to))
    narrow, read = UNSIGNED[size_of(source)], view_of(source)
    wide, kept = (SIGNED if to[0] == "s" else UNSIGNED)[size_of(to)], UNSIGNED[d.widths[target]]
    return d.assign(lambda x: read(x.astype(narrow)).astype(wide).astype(kept), target, held)
