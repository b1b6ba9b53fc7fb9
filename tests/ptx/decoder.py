"""Instructions and their operands become functions of the registers of a group of threads that run together.

Registers hold bits: unsigned integers of their width, predicates booleans; one value for each thread, or a single one
where it is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .faults import UnknownInstructionError
from .numbers import UNSIGNED
from .parser import Instruction, Text
from .shared import BASE
from .tensors import Access

Array = np.ndarray
Run = Callable[[Any], Any]
Operands = tuple[str, ...]
Family = Callable[["Decoder", Operands], "Run | Operation"]  # decodes an opcode
SPECIAL = ("%tid.x", "%laneid", "%warpid", "%ntid.x", *(f"%{kind}ctaid.{axis}" for kind in ("", "n") for axis in "xyz"))
POISON = {
    0: np.array([False]),
    **{size: np.array([0xDEADBEEFDEADBEEF], np.uint64).astype(UNSIGNED[size]) for size in (1, 2, 4, 8)},
}


class Operation(NamedTuple):
    """A decoded instruction.

    run: of a group of threads. kind: "plain", "global" (an access to global memory), "branch", "barrier" or "return".
    collective: how many threads, neighbours, must be together. polled: of a load that may be a poll, its first address.
    reads, writes: registers.
    """

    run: Run
    instruction: Instruction
    kind: str = "plain"
    collective: int = 0
    polled: Callable[[Any], int | None] | None = None
    target: int = -1
    reads: frozenset[int] = frozenset()
    writes: frozenset[int] = frozenset()


class Decoder:
    """Registers and operands of a kernel.

    families: what decodes an opcode, by its first part. initial: what a register holds at the start. accesses: to
    memory, by the number of the instruction.
    """

    def __init__(self, text: Text, families: Mapping[str, Family]) -> None:
        self.text, self.families = text, families
        self.slots: dict[Any, int] = {}
        self.widths: list[int] = []
        self.initial: list[Array] = []
        self.reads: set[int] = set()
        self.writes: set[int] = set()
        self.accesses: list[Access | None] = [None] * len(text.code)

    def decode(self, instruction: Instruction, number: int) -> Operation:
        self.at, self.parts, self.number = instruction, instruction.parts, number
        self.reads, self.writes, self.guarded = set(), set(), False
        try:
            made = self.families[self.parts[0]](self, instruction.operands)
        except (IndexError, KeyError, ValueError):  # too few or too many parts or operands, or others than there are
            raise self.unknown() from None
        self.require(self.guarded or instruction.guard is None)
        operation = made if isinstance(made, Operation) else Operation(made, instruction)
        return operation._replace(reads=frozenset(self.reads), writes=frozenset(self.writes))

    def unknown(self) -> UnknownInstructionError:
        return UnknownInstructionError(
            f"the emulator does not know {self.at.opcode}, or this form of it: {self.at.place}"
        )

    def only(self, *known: str) -> None:
        """Raises unless all modifiers are known, and there once."""
        self.require(set(self.parts[1:]) <= set(known) and len(set(self.parts)) == len(self.parts))

    def require(self, condition: bool) -> None:
        if not condition:
            raise self.unknown()

    def access(self, kind: str, ordering: str = "weak", scope: str = "sys", cached: bool = False) -> Access:
        made = Access(kind, ordering, scope, cached, self.number, self.at.place)
        self.accesses[self.number] = made
        return made

    # Registers
    def slot(self, name: Any, width: int, value: Array | None = None) -> int:
        if name not in self.slots:
            self.slots[name] = len(self.initial)
            self.widths.append(width)
            self.initial.append(POISON[width] if value is None else value)
        return self.slots[name]

    def register(self, name: str) -> int:
        prefix = name if name in self.text.registers else name.rstrip("0123456789")
        if prefix not in self.text.registers:
            raise self.unknown()
        return self.slot(name, self.text.registers[prefix])

    def source(self, operand: str, width: int | None) -> int:
        """The register of an operand of so many bytes, 0 for a predicate; a constant has one, too. width None: any."""
        if operand in SPECIAL:
            self.require(width in (4, None))
            return self.slot(operand, 4)
        if operand == "global_smem":
            self.require(width is not None)
            return self.constant(BASE, width)
        if operand[0] == "%" or operand in self.text.registers:
            slot = self.register(operand)
            self.require(width is None or self.widths[slot] == width)
            self.reads.add(slot)
            return slot
        self.require(width is not None)
        size = {"0f": 4, "0d": 8}.get(operand[:2])
        self.require(size in (width, None))
        return self.constant(int(operand[2:], 16) if size else int(operand.removesuffix("U"), 0), width)

    def constant(self, value: int, width: int) -> int:
        if width == 0:
            return self.slot((value, 0), 0, np.array([value != 0]))
        bits = np.array([value & (1 << 8 * width) - 1], UNSIGNED[width])
        return self.slot((int(bits[0]), width), width, bits)

    def destination(self, operand: str, width: int | None) -> int:
        if operand == "_":
            return self.slot("_", 8)
        slot = self.register(operand)
        self.require(width is None or self.widths[slot] == width)
        self.writes.add(slot)
        return slot

    def vector(self, operand: str, count: int | None = None) -> list[str]:
        """The names in braces, or the one without. count: how many they must be."""
        names = [name.strip() for name in operand.strip("{} ").split(",")]
        self.require(count in (len(names), None))
        return names

    def sources(self, operand: str, count: int, width: int) -> list[int]:
        return [self.source(name, width) for name in self.vector(operand, count)]

    def destinations(self, operand: str, count: int, width: int) -> list[int]:
        return [self.destination(name, width) for name in self.vector(operand, count)]

    @property
    def guard(self) -> Callable[[list[Array]], Array] | None:
        """The threads that take part, of the registers. A guard that nobody asks for is an error."""
        self.guarded = True
        name = self.at.guard
        if name is None:
            return None
        p = self.source(name.lstrip("!"), 0)
        return (lambda registers: ~registers[p]) if name[0] == "!" else (lambda registers: registers[p])

    def compute(self, function: Callable[..., Array], operands: tuple[str, ...], result: int, *widths: int) -> Run:
        """The first operand, of `result` bytes, = function(the others, of `widths` bytes)."""
        sources = [self.source(operand, width) for operand, width in zip(operands[1:], widths, strict=True)]
        return self.assign(function, self.destination(operands[0], result), *sources)

    def assign(self, function: Callable[..., Array], destination: int, *sources: int) -> Run:
        """destination = function(sources), for the threads that take part."""
        guard = self.guard
        if guard is not None:
            self.reads.add(destination)

            def guarded(group: Any) -> None:
                r = group.registers
                r[destination] = np.where(guard(r), function(*[r[k] for k in sources]), r[destination])

            return guarded
        if len(sources) == 1:
            (a,) = sources

            def unary(group: Any) -> None:
                r = group.registers
                r[destination] = function(r[a])

            return unary
        if len(sources) == 2:
            a, b = sources

            def binary(group: Any) -> None:
                r = group.registers
                r[destination] = function(r[a], r[b])

            return binary

        def several(group: Any) -> None:
            r = group.registers
            r[destination] = function(*[r[k] for k in sources])

        return several

    def address(self, operand: str, width: int) -> Callable[[list[Array]], Array]:
        inner = operand.strip()
        self.require(inner[0] == "[" and inner[-1] == "]")
        base, _, offset = (part.strip() for part in inner[1:-1].partition("+"))
        slot, more = self.source(base, width), UNSIGNED[width](int(offset or 0) & (1 << 8 * width) - 1)
        return (lambda r: r[slot] + more) if more else (lambda r: r[slot])


def size_of(kind: str) -> int:
    """Bytes of b32, f16x2, s64; 0 of pred."""
    if kind == "pred":
        return 0
    known = {"b": (8, 16, 32, 64), "u": (8, 16, 32, 64), "s": (8, 16, 32, 64), "f": (16, 32, 64)}
    if kind == "f32x2":
        return 8
    if kind in ("f16x2", "bf16x2", "tf32"):
        return 4
    if kind == "bf16":
        return 2
    if kind[0] not in known or not kind[1:].isdigit() or int(kind[1:]) not in known[kind[0]]:
        return -1
    return int(kind[1:]) // 8
