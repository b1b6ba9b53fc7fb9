"""Instructions of whole warps: shuffles, reductions, barriers, and the products of the tensor cores."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from . import numbers, products
from .decoder import Decoder, Operands, Operation
from .faults import Fault, UnknownInstructionError
from .numbers import U32

Array = np.ndarray
WHOLE = ("-1", "0xffffffff", "0xFFFFFFFF")  # all lanes of a warp


def shuffle(d: Decoder, o: Operands) -> Operation:
    _, sync, mode, kind = d.parts
    to, value, step_or_lane, clamp_and_mask, members = o
    d.require(sync == "sync" and kind == "b32" and mode in ("bfly", "idx", "up", "down") and members in WHOLE)
    name, *predicate = to.split("|")
    target, source, by = d.destination(name, 4), d.source(value, 4), d.source(step_or_lane, 4)
    taken = d.destination(predicate[0], 0) if predicate else None
    clamp = int(clamp_and_mask, 0)
    segment, limit = clamp >> 8 & 31, clamp & 31

    def run(group: Any) -> None:
        x, n = group.full(source), group.size
        lane = np.arange(n) % 32
        step = group.registers[by].astype(np.int64) & 31
        first = lane & segment
        last = first | (limit & ~segment)
        other = {"bfly": lane ^ step, "idx": first | (step & ~segment), "up": lane - step, "down": lane + step}[mode]
        inside = other >= last if mode == "up" else other <= last
        group.registers[target] = x[np.where(inside, np.arange(n) - lane + other, np.arange(n))]
        if taken is not None:
            group.registers[taken] = inside

    return Operation(run, d.at, collective=32)


REDUCTIONS: dict[str, np.ufunc] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


def reduce_warp(d: Decoder, o: Operands) -> Operation:
    _, sync, what, kind = d.parts
    to, value, members = o
    d.require(sync == "sync" and kind in (("b32",) if what in ("and", "or", "xor") else ("s32", "u32")))
    target, source, mask = d.destination(to, 4), d.source(value, 4), d.source(members, 4)
    function, view, unknown = REDUCTIONS[what], np.int32 if kind == "s32" else U32, d.unknown()

    def run(group: Any) -> None:
        if (group.registers[mask] != U32(0xFFFFFFFF)).any():
            raise unknown  # a part of a warp
        by_warp = group.full(source).view(view).reshape(-1, 32)
        group.registers[target] = np.repeat(function.reduce(by_warp, 1), 32).astype(view).view(U32)

    return Operation(run, d.at, collective=32)


def vote(d: Decoder, o: Operands) -> Operation:
    _, sync, what, kind = d.parts
    to, value, members = o
    d.require(sync == "sync" and members in WHOLE)
    d.require((what, kind) in (("any", "pred"), ("all", "pred"), ("ballot", "b32")))
    negated, source = value[0] == "!", d.source(value.removeprefix("!"), 0)
    target = d.destination(to, 0 if kind == "pred" else 4)

    def run(group: Any) -> None:
        votes = (group.full(source) ^ negated).reshape(-1, 32)
        if what == "ballot":
            answer = (votes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(U32)
        else:
            answer = votes.any(1) if what == "any" else votes.all(1)
        group.registers[target] = np.repeat(answer, 32)

    return Operation(run, d.at, collective=32)


def barrier(d: Decoder, o: Operands) -> Operation:
    if d.at.opcode == "bar.warp.sync":
        d.require(len(o) == 1 and o[0] in WHOLE)
        return Operation(lambda group: group.warp_barrier(), d.at, collective=32)
    d.require(d.at.opcode.removesuffix(".aligned") in ("bar.sync", "bar.cta.sync", "barrier.sync", "barrier.cta.sync"))
    d.require(o == ("0",))
    return Operation(lambda group: None, d.at, kind="barrier", collective=32)


# The tensor cores


def matrix_product(d: Decoder, o: Operands) -> Operation:
    _, sync, aligned, shape, row, column, out, kind, kind_b, into = d.parts
    d.require((sync, aligned, row, column) == ("sync", "aligned", "row", "col") and kind == kind_b and out == into)
    to, first, second, third = o
    if shape == "m8n8k4":
        d.require(out == kind == "f64")
        targets, c = d.destinations(to, 2, 8), d.sources(third, 2, 8)
        (a,), (b,) = d.sources(first, 1, 8), d.sources(second, 1, 8)

        def run_f64(group: Any) -> None:
            results = products.mma_f64(group.full(a), group.full(b), [group.full(x) for x in c])
            for target, result in zip(targets, results, strict=True):
                group.registers[target] = result

        return Operation(run_f64, d.at, collective=32)
    d.require(out == "f32" and shape.startswith("m16n8k") and (kind, int(shape[6:])) in products.MMA)
    k = int(shape[6:])
    count = k * products.OPERANDS[kind][0] // 8  # registers of A
    targets, c = d.destinations(to, 4, 4), d.sources(third, 4, 4)
    a, b = d.sources(first, count, 4), d.sources(second, count // 2, 4)

    def run(group: Any) -> None:
        results = products.mma(kind, k, *([group.full(x) for x in part] for part in (a, b, c)))
        for target, result in zip(targets, results, strict=True):
            group.registers[target] = result

    return Operation(run, d.at, collective=32)


def warp_group(d: Decoder, o: Operands) -> Operation:
    """wgmma: the product of four warps, whose operands the tensor cores read on their own until they are waited for."""
    what = d.parts[1]
    if what in ("fence", "commit_group", "wait_group"):
        d.require(d.parts[2:] == ["sync", "aligned"] and len(o) == (what == "wait_group"))
        left = int(o[0]) if o else 0
        return Operation(lambda group: getattr(group, f"products_{what}")(left), d.at, collective=128)
    _, _, sync, aligned, shape, out, kind, kind_b = d.parts
    d.require((what, sync, aligned, out) == ("mma_async", "sync", "aligned", "f32") and kind == kind_b)
    found = re.fullmatch(r"m64n(\d+)k(\d+)", shape)
    d.require(found is not None)
    n, k = (int(x) for x in found.groups())
    size, read = products.OPERANDS[kind]
    d.require(k * size == 32 and n % 8 == 0 and 8 <= n <= 256)
    to, first, second, scale_d, scale_a, scale_b, *transposed = o
    accumulators = d.destinations(to, n // 2, 4)
    in_registers = first[0] == "{"
    a = d.sources(first, 4, 4) if in_registers else [d.source(first, 8)]
    b, scale = d.source(second, 8), d.source(scale_d, 0)
    d.reads |= set(accumulators)
    d.require(scale_a == scale_b == "1" and set(transposed) <= {"0", "1"})
    d.require(len(transposed) == (0 if size == 4 else 1 if in_registers else 2))
    a_transposed, b_transposed = transposed[:-1] == ["1"], transposed[-1:] == ["1"]
    access = d.access("load")
    registers = frozenset(accumulators) | (frozenset(a) if in_registers else frozenset())

    def run(group: Any) -> None:
        group.product_begins(registers, frozenset(accumulators), access)
        shared = group.program.shared
        sums = [group.full(x).view(np.float32) for x in accumulators]
        out = [np.empty(group.size, np.float32) for _ in accumulators]
        for first in range(0, group.size, 128):
            part = slice(first, first + 128)
            warps = group.threads[part][::32] // 32

            def operand(slot: int, rows: int, transpose: bool, part: slice = part, warps: Array = warps) -> Array:
                descriptors = group.full(slot)[part]
                if (descriptors != descriptors[0]).any():
                    raise Fault(f"the threads of a warp group have different descriptors: {access.place}")
                if int(descriptors[0]) & ~products.DESCRIPTOR:
                    raise UnknownInstructionError(
                        f"the descriptor {int(descriptors[0]):#x} is not known: {access.place}"
                    )
                addresses = products.tile_addresses(int(descriptors[0]), rows, k, size, transpose)
                return shared.load_for_product(warps, group.committed, addresses, size, access)

            if in_registers:
                x = products.wgmma_a([group.full(slot)[part] for slot in a], size)
            else:
                x = operand(a[0], 64, a_transposed)
            product = products.wgmma_accumulators(read(x) @ read(operand(b, n, b_transposed)).T)
            add = group.full(scale)[part]
            for result, sum_, value in zip(out, sums, product, strict=True):
                result[part] = np.where(add, sum_[part] + value, value)
        for target, result in zip(accumulators, out, strict=True):
            group.registers[target] = numbers.bits_of(result)

    return Operation(run, d.at, collective=128)
