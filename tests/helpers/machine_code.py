"""Reads what the compiler made: Triton's GPU dialect and NVIDIA's machine code."""

import os
import re
import subprocess
import tempfile

import triton

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


def disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes of stack, and the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [os.path.join(TOOLS, tool), flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack), code


def time_loop(code: str) -> list[str]:
    """The machine instructions of a step: the smallest loop with a matrix product and a store to memory."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if match := re.match(r"(\.L_\w+):", line.strip()):
            labels[match[1]] = len(instructions)
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*);", line):
            instructions.append(match[1])
    loops = [
        instructions[labels[to] : k + 1]
        for k, text in enumerate(instructions)
        for to in re.findall(r"\bBRA.*`\((\.L_\w+)\)", text)
        if labels.get(to, k + 1) <= k
    ]
    steps = [loop for loop in loops if count(r"MMA", loop) and count(r"\bSTG", loop)]
    return min(steps, key=len)


def count(pattern: str, instructions: list[str]) -> int:
    return sum(bool(re.search(pattern, text)) for text in instructions)


def inside_time_loop(ttgir: str) -> tuple[list[str], list[str]]:
    """The lines before Triton's loop over the steps, and those inside of it."""
    lines = ttgir.splitlines()
    begin = next(k for k, line in enumerate(lines) if "scf.for" in line and "%step_begin" in line)
    indent = len(lines[begin]) - len(lines[begin].lstrip())
    end = next(k for k in range(begin + 1, len(lines)) if lines[k].startswith(" " * indent + "}"))
    return lines[:begin], lines[begin:end]


def weight_loads(before: list[str], inside: list[str]) -> tuple[int, int]:
    """How many loads from W_hh stand before the time loop and inside of it."""
    pointers = {"%w_hh_ptr"}
    found = []
    for lines in (before, inside):
        loads = 0
        for line in lines:
            match = re.match(r"\s*(%[\w]+)(?::\d+)? = (\S+) (.*)", line)
            if not match or not pointers & set(re.findall(r"%\w+", match[3])):
                continue
            if match[2] == "tt.load":
                loads += 1
            elif "tt.ptr" in line:
                pointers.add(match[1])
        found.append(loads)
    return found[0], found[1]
