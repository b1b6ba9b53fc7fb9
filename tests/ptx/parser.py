"""The text of one PTX kernel: its parameters, registers, and instructions with their places in the source."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from .faults import UnknownInstructionError

IGNORED = (".loc", ".file", ".pragma", ".maxnreg", ".minnctapersm", ".reqntid", ".target", ".version", ".address_size")


class Instruction(NamedTuple):
    """`@guard opcode operands;`

    parts: the opcode's, at its dots. guard: a predicate's name, with `!` before it if it is negated. line: in the PTX.
    source: the file and line of the kernel's Python.
    """

    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    line: int
    source: str

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".rstrip()

    @property
    def place(self) -> str:
        return f"{self.source} (PTX line {self.line}: {self})"


class Text(NamedTuple):
    """A kernel's text.

    parameters: bytes of each name. registers: bytes of each name or prefix of numbered names; 0 for a predicate.
    labels: the index of the instruction that follows each.
    """

    name: str
    parameters: dict[str, int]
    threads: int
    registers: dict[str, int]
    labels: dict[str, int]
    code: list[Instruction]


def parse(ptx: str) -> Text:
    """Raises UnknownInstructionError for a statement or directive that is not known."""
    head = re.search(r"\.entry (\w+)\(([^)]*)\)([^{]*)\{", ptx)
    threads = re.search(r"^\s*\.reqntid (\d+)(?:, 1, 1)?\s*$", head[3], re.MULTILINE) if head else None
    if head is None or threads is None:
        raise UnknownInstructionError("no kernel with .entry and .reqntid of one dimension in this PTX")
    for line in head[3].splitlines():
        if line.strip() and not _ignored(line):
            raise UnknownInstructionError(f"{head[1]}: {line.strip()!r} is a directive that is not known")
    files = {number: Path(path).name for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)}
    text = Text(head[1], _parameters(head[2]), int(threads[1]), {}, {}, [])
    source, first = "?", ptx[: head.end()].count("\n") + 1
    for number, line in enumerate(ptx[head.end() :].splitlines(), first):
        line = line.split("//")[0].strip()
        if line.startswith(".section"):
            break
        if place := re.match(r"\.loc\s+(\d+) (\d+)", line):
            source = f"{files.get(place[1], '?')}:{place[2]}"
            continue
        while label := re.match(r"([\w$]+):(?!:)\s*", line):
            if label[1] in text.labels:
                raise UnknownInstructionError(f"PTX line {number}: there is another label {label[1]}")
            text.labels[label[1]] = len(text.code)
            line = line[label.end() :]
        if line in ("", "{", "}") or _ignored(line):
            continue
        line = re.sub(r"^\{\s*(?=[.@a-z])|(?<=;)\s*\}$", "", line)  # a scope of inline assembly
        if not line.endswith(";"):
            raise UnknownInstructionError(f"PTX line {number}: {line!r} is no statement")
        for statement in line.removesuffix(";").split(";"):
            _add(statement.strip(), text.registers, text.code, number, source)
    if not text.code or text.code[-1].opcode not in ("ret", "bra", "bra.uni") or text.code[-1].guard:
        raise UnknownInstructionError(f"{head[1]} does not end with ret or bra")
    return text


def _ignored(line: str) -> bool:
    return line.split()[0] in IGNORED


def _parameters(text: str) -> dict[str, int]:
    """`.param .u64 .ptr .global .align 1 name` and so on."""
    parameters = {}
    for parameter in filter(str.strip, text.split(",")):
        found = re.fullmatch(
            r"\.param \.[busf](32|64|16|8)(?: \.ptr(?: \.global)? \.align \d+)? (\w+)", parameter.strip()
        )
        if found is None:
            raise UnknownInstructionError(f"a kernel's parameter that is not known: {parameter.strip()!r}")
        parameters[found[2]] = int(found[1]) // 8
    return parameters


def _add(statement: str, registers: dict[str, int], code: list[Instruction], number: int, source: str) -> None:
    if declared := re.fullmatch(r"\.reg\s+\.(pred|[a-z](\d+))\s+([%\w<>,\s]+)", statement):
        for name in re.split(r"[,\s]+", declared[3].strip()):
            registers[name.split("<")[0]] = int(declared[2] or 0) // 8
        return
    found = re.fullmatch(r"(?:@(!?[%\w]+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", statement)
    if found is None:
        raise UnknownInstructionError(f"PTX line {number}: {statement!r} is no instruction")
    code.append(Instruction(found[2], tuple(_operands(found[3] or "")), found[1], number, source))


def _operands(text: str) -> list[str]:
    """Split at the commas that are in no braces or brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]
