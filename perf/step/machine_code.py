"""NVIDIA's machine code as text and as instructions with their control bits (128-bit encoding, sm_70 and newer)."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import tempfile

_triton = importlib.util.find_spec("triton")  # which is not imported: kernels would be as TRITON_INTERPRET is now
TOOLS = os.path.join(os.path.dirname(_triton.origin or ""), "backends", "nvidia", "bin") if _triton else ""
NONE = 7  # a scoreboard field that names none

# Kinds of instructions that the issue model tells apart, by the name before the first dot
_KINDS = {
    "load": "LDG LD",
    "store": "STG ST",
    "local": "LDL STL",
    "shared_load": "LDS LDSM",
    "shared_store": "STS STSM",
    "shuffle": "SHFL",
    "reduce": "REDUX",
    "barrier": "BAR",
    "mma": "HMMA IMMA",
    "wgmma": "HGMMA IGMMA QGMMA",
    "wgmma_wait": "WARPGROUP",
    "tcgen05": "UTCHMMA UTCQMMA UTCIMMA",
    "special": "MUFU",
    "convert": "F2F I2F F2I FRND",
    "register": "S2UR S2R",
    "constant": "LDC",
    "float": "FFMA FADD FMUL FFMA2 HFMA2 HADD2 HMUL2",
    "atomic": "ATOMG RED REDG ATOM",
    "control": "BRA EXIT NOP WARPSYNC YIELD BSSY BSYNC CALL RET BRX JMP ERRBAR CGAERRBAR CCTL FENCE DEPBAR",
}
_KIND = {name: kind for kind, names in _KINDS.items() for name in names.split()}
PRODUCTS = ("mma", "wgmma", "tcgen05")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    text: without a guard predicate. name: with its modifiers. guard: the predicate that it runs under, or "".
    target: the index of the instruction that it may jump to, or None.
    stall: cycles until the warp's next instruction. read, write: the scoreboard (0 to 5) that is held until operands
    are read, or the result is there; NONE for none. waits: the scoreboards that have to be free before it issues.
    """

    text: str
    name: str
    guard: str
    target: int | None
    stall: int
    yields: bool
    read: int
    write: int
    waits: tuple[int, ...]

    @functools.cached_property
    def kind(self) -> str:
        base = self.name.split(".")[0]
        if base in _KIND:
            return _KIND[base]
        if base == "MEMBAR":  # those of a program's own threads cost nothing
            return "fence" if "GPU" in self.name or "SYS" in self.name else "control"
        if base.startswith("IMAD"):
            return "imad"
        return "uniform" if base.startswith("U") or base == "R2UR" else "alu"

    @property
    def jumps(self) -> bool:
        return self.name.split(".")[0] in ("BRA", "EXIT", "RET", "BRX", "CALL", "JMP")

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow; a call returns, or is a conditional jump in disguise."""
        conditional = bool(self.guard) or bool(re.match(r"\S+ !?U?P\d", self.text))
        return not self.jumps or conditional or self.name.startswith("CALL")

    @functools.cached_property
    def strong(self) -> bool:
        """A load that sees what other programs store: volatile, acquiring, or past the first cache."""
        return self.kind == "load" and "STRONG" in self.name

    @functools.cached_property
    def width(self) -> int:
        """Bytes a thread loads or stores."""
        for bits in (128, 64, 16, 8):
            if re.search(rf"\.[USB]?{bits}\b", self.name):
                return bits // 8
        return 4

    @functools.cached_property
    def wavefronts(self) -> int:
        """Passes of the load and store unit, 128 bytes of a warp each."""
        if self.name.startswith(("LDSM", "STSM")):
            match = re.search(r"\.(\d)$", self.name)
            return int(match[1]) if match else 1
        return max(1, self.width // 4)


def parse(text: str) -> list[Instruction]:
    """The instructions of the first kernel in the output of `nvdisasm -hex -c`."""
    labels: dict[str, int] = {}
    rows: list[tuple[str, int]] = []
    pending: list[str] = []
    lines = iter(text.splitlines())
    inside = False
    for line in lines:
        if line.startswith("//---") and ".text." in line:
            if inside:
                break
            inside = True
        elif match := re.match(r"(\.L_\w+):", line.strip()):
            pending.append(match[1])
        elif inside and (match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/", line)):
            labels |= dict.fromkeys(pending, len(rows))
            pending.clear()
            upper = re.search(r"/\* 0x([0-9a-f]{16}) \*/", next(lines))
            assert upper, line
            rows.append((match[1], int(upper[1], 16)))
    return [_instruction(text, upper, labels) for text, upper in rows]


def _instruction(text: str, upper: int, labels: dict[str, int]) -> Instruction:
    """upper: the upper 64 of 128 bits, which hold the control bits."""
    guard = ""
    if match := re.match(r"@(!?U?P\w+)\s+(.*)", text):
        guard, text = match[1], match[2]
    to = re.search(r"`\((\.L_\w+)\)", text)
    wait = upper >> 52 & 63
    return Instruction(
        text=text,
        name=text.split()[0],
        guard=guard,
        target=labels.get(to[1]) if to else None,
        stall=upper >> 41 & 15,
        yields=bool(upper >> 45 & 1),
        write=upper >> 46 & 7,
        read=upper >> 49 & 7,
        waits=tuple(k for k in range(6) if wait >> k & 1),
    )


def why_no_tools() -> str | None:
    """The reason why nothing can be disassembled here, or None."""
    missing = [tool for tool in ("cuobjdump", "nvdisasm") if not os.access(os.path.join(TOOLS, tool), os.X_OK)]
    return f"this Triton came without NVIDIA's {' and '.join(missing)}" if missing else None


def disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes of stack, and the machine code, as `parse` takes it.

    Raises FileNotFoundError where Triton came without NVIDIA's tools, ValueError for what is no cubin.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            _run(*command, file.name) for command in (("cuobjdump", "-res-usage"), ("nvdisasm", "-hex", "-c"))
        )
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if not match:
        raise ValueError("no machine code: the cubin has no kernel")
    return int(match[1]), int(match[2]), code


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([os.path.join(TOOLS, tool), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"no machine code: {tool} says: {(done.stderr or done.stdout).strip()}")
    return done.stdout
