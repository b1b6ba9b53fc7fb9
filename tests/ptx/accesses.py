"""Instructions that access memory, and fences."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from . import products
from .arithmetic import typed
from .decoder import Decoder, Operands, Operation, Run, size_of
from .numbers import SIGNED, UNSIGNED
from .tensors import Access

Array = np.ndarray


def load_parameter(d: Decoder, o: Operands) -> Run:
    kind = d.parts[-1]
    d.only("param", kind)
    to, name = o
    number, size = [f"[{parameter}]" for parameter in d.text.parameters].index(name), size_of(kind)
    d.require(size == d.text.parameters[name[1:-1]])
    target = d.destination(to, None)
    d.require(d.widths[target] >= size)
    narrow = (SIGNED if kind[0] == "s" else UNSIGNED)[size]  # decides what a wider register has above
    wide = UNSIGNED[d.widths[target]]
    return d.assign(lambda a: a.view(narrow).astype(wide), target, d.slot(("parameter", number), size))


ORDERINGS = {
    "load": ("weak", "relaxed", "acquire", "volatile"),
    "store": ("weak", "relaxed", "release", "volatile"),
    "atomic": ("relaxed", "acquire", "release", "acq_rel"),
}
SCOPES = ("cta", "cluster", "gpu", "sys")
CACHES = {"load": ("ca", "cg", "cs", "cv", "lu"), "store": ("wb", "cg", "cs", "wt"), "atomic": ()}


def _memory(d: Decoder, kind: str, *more: str) -> tuple[str, int, int, Access]:
    """The space, bytes of an element, elements of a vector, and the access of ld, st, atom or red."""

    def one_of(known: tuple[str, ...], default: str) -> str:
        found = [part for part in d.parts if part in known]
        d.require(len(found) <= 1)
        return found[0] if found else default

    space = one_of(("global", "shared", "shared::cta"), "")
    vector = one_of(("v2", "v4", "v8"), "v1")
    cache = one_of(CACHES[kind], "")
    ordering = one_of(ORDERINGS[kind], "relaxed" if kind == "atomic" else "weak")
    scope = one_of(SCOPES, "gpu" if kind == "atomic" else "sys")
    element = d.parts[-1]
    size = size_of(element)
    d.only(space, vector, cache, ordering, scope, element, *more)
    d.require(bool(space) and size > 0 and element[1:].isdecimal())
    if kind != "atomic":  # a scope stands where it has a meaning, and nowhere else
        d.require((scope in d.parts) == (ordering not in ("weak", "volatile")))
    if ordering == "volatile":
        ordering = "relaxed"  # .sys
    cached = kind == "load" and ordering == "weak" and cache not in ("cg", "cv")
    return space.removesuffix("::cta"), size, int(vector[1:]), d.access(kind, ordering, scope, cached)


def load(d: Decoder, o: Operands) -> Run | Operation:
    if d.parts[1] == "param":
        return load_parameter(d, o)
    space, size, vector, access = _memory(d, "load")
    to, where = o
    names = d.vector(to, vector)
    targets = [(k, d.destination(name, None)) for k, name in enumerate(names) if name != "_"]
    d.require(all(d.widths[target] >= size for _, target in targets))
    address, guard = d.address(where, 4 if space == "shared" else 8), d.guard
    if guard:
        d.reads |= {target for _, target in targets}
    wide = {target: UNSIGNED[d.widths[target]] for _, target in targets}
    kind = (SIGNED if d.parts[-1][0] == "s" else UNSIGNED)[size]  # decides what a wider register has above

    def run(group: Any) -> None:
        r = group.registers
        lanes, threads, addresses = group.taking_part(guard, address(r))
        if space == "shared":
            values = group.program.shared.load(threads, addresses, size, vector, access)
        else:
            values = group.program.memory.load(group.program.number, threads, addresses, size, vector, access)
        for k, target in targets:
            value = values[k].view(kind).astype(wide[target])
            if lanes is not None:
                whole = group.full(target).copy()
                whole[lanes] = value
                value = whole
            r[target] = value

    polled = _first_address(address, guard) if space == "global" else None
    return Operation(run, d.at, kind="global" if space == "global" else "plain", polled=polled)


def _first_address(address: Callable[..., Array], guard: Callable[..., Array] | None) -> Callable[[Any], int | None]:
    def first(group: Any) -> int | None:
        _, threads, addresses = group.taking_part(guard, address(group.registers))
        return int(addresses[0]) if threads.size else None

    return first


def store(d: Decoder, o: Operands) -> Operation:
    space, size, vector, access = _memory(d, "store")
    where, values = o
    sources = [d.source(name, None if name[0] == "%" else size) for name in d.vector(values, vector)]
    d.require(all(d.widths[source] >= size for source in sources))
    address, guard, unsigned = d.address(where, 4 if space == "shared" else 8), d.guard, UNSIGNED[size]

    def run(group: Any) -> None:
        r = group.registers
        lanes, threads, addresses = group.taking_part(guard, address(r))
        values = [group.full(x).astype(unsigned) for x in sources]
        if lanes is not None:
            values = [value[lanes] for value in values]
        if space == "shared":
            group.program.shared.store(threads, addresses, values, access)
        else:
            group.program.store(threads, addresses, values, access)

    return Operation(run, d.at, kind="global" if space == "global" else "plain")


ATOMICS: dict[str, Callable[..., Array]] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "exch": lambda old, new: new,
    "cas": lambda old, compare, new: np.where(old == compare, new, old),
}  # fmt: skip


def atomic(d: Decoder, o: Operands) -> Operation:
    (what,) = (part for part in d.parts if part in ATOMICS)
    kind = d.parts[-1]
    space, size, vector, access = _memory(d, "atomic", what)
    d.require(space == "global" and vector == 1 and size >= 4 and kind[0] in "bus")
    d.require(kind[0] == "b" if what in ("exch", "cas", "and", "or", "xor") else kind[0] != "b")
    returns = d.parts[0] == "atom"
    d.require(returns or what not in ("exch", "cas"))
    target = d.destination(o[0], size) if returns else None
    where, *operands = o[returns:]
    address, guard = d.address(where, 8), d.guard
    sources = [d.source(x, size) for x in operands]
    d.require(len(sources) == (2 if what == "cas" else 1))
    operation = typed(kind, ATOMICS[what]) if kind[0] == "s" else ATOMICS[what]

    def run(group: Any) -> None:
        lanes, threads, addresses = group.taking_part(guard, address(group.registers))
        values = [group.full(x) if lanes is None else group.full(x)[lanes] for x in sources]
        old = group.program.memory.atomic(group.program.number, threads, addresses, operation, values, access)
        if target is not None:
            if lanes is not None:
                whole = group.full(target).copy()
                whole[lanes] = old
                old = whole
            group.registers[target] = old

    return Operation(run, d.at, kind="global", polled=_first_address(address, guard))


def _rows(d: Decoder) -> tuple[int, bool]:
    """How many 8x8 matrices an ldmatrix or stmatrix moves, and whether transposed."""
    form = re.fullmatch(r"..matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16", d.at.opcode)
    d.require(form is not None)
    return int(form[1]), form[2] is not None


def load_matrix(d: Decoder, o: Operands) -> Operation:
    count, transposed = _rows(d)
    to, where = o
    targets, address, access = d.destinations(to, count, 4), d.address(where, 4), d.access("load")

    def run(group: Any) -> None:
        threads, addresses = group.row_addresses(address(group.registers), count)
        rows = group.program.shared.load_rows(threads, addresses, access)
        for k, target in enumerate(targets):
            group.registers[target] = products.from_rows(rows[:, 8 * k : 8 * k + 8], transposed).ravel()

    return Operation(run, d.at, collective=32)


def store_matrix(d: Decoder, o: Operands) -> Operation:
    count, transposed = _rows(d)
    where, values = o
    sources, address, access = d.sources(values, count, 4), d.address(where, 4), d.access("store")

    def run(group: Any) -> None:
        threads, addresses = group.row_addresses(address(group.registers), count)
        rows = [products.to_rows(group.full(x).reshape(-1, 32), transposed) for x in sources]
        group.program.shared.store_rows(threads, addresses, np.concatenate(rows, 1), access)

    return Operation(run, d.at, collective=32)


def fence(d: Decoder, o: Operands) -> Operation:
    d.require(not o)
    if d.at.opcode in ("fence.proxy.async", "fence.proxy.async.shared::cta"):
        return Operation(lambda group: group.proxy_fence(), d.at, collective=32)
    if d.parts[0] == "membar":
        _, level = d.parts
        semantics, scope = "sc", {"cta": "cta", "gl": "gpu", "sys": "sys"}[level]
    else:
        _, semantics, scope = d.parts
        d.require(semantics in ("acq_rel", "sc") and scope in SCOPES)
    guard = d.guard
    return Operation(lambda group: group.fence(guard, scope, semantics == "sc"), d.at, kind="global")
