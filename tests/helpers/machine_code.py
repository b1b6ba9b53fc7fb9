"""Reads what the compiler made: Triton's GPU dialect, and counts of instructions."""

import re


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
