"""Mutants that nothing notices, with the reason of each, and the table of all for docs/explanation/ptx_mutants.md."""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import triton

from triton_lstm import kernels


class Row(NamedTuple):
    """A mutant and what noticed it."""

    case: str
    group: str
    mutation: str
    where: str
    by: str
    memory: str
    text: str


class Reason(NamedTuple):
    """Why nothing has to notice a mutant.

    mutation, where: regular expressions, of the latter for the function and the PTX.
    """

    mutation: str
    where: str
    text: str


REASONS = [
    Reason(
        "bar.sync (taken out|of a warp only)",
        "lstm_backward_kernel",
        "Triton puts a barrier where accesses to shared memory might meet by its analysis of intervals. Here no thread "
        "touches a byte that another one touched since the barrier before: these are redundant",
    ),
    Reason(
        "words of one step",
        "",
        "Only a schedule shows it in which a program is held up, from when the parts are there until it has read them, "
        "for a whole step of the others; with looks at all parts from the beginning, seeds showed it",
    ),
    Reason(
        "the sentinel may be stored",
        "",
        "What is stored comes from an instruction whose NaN is the canonical one: no value of these tests is another",
    ),
    Reason(
        "the rows' loads may be cached",
        "",
        "To PTX's model an acquire orders all loads after it, whatever their cache operator: `.cg` is a precaution",
    ),
    Reason(
        "the end of a step's rows is filled with 0",
        "",
        "Only a schedule shows it in which just these elements are late; in other kernels one of the seeds is such",
    ),
    Reason(
        "wait_group taken out",
        "multiply",
        "The next chunk's products come after a chunk's, and read other shared memory: only the last wait is needed",
    ),
    Reason(
        "",
        "await_count: `ld.relaxed",
        "The count decides when rows are looked at for the first time, and nothing else",
    ),
    Reason(
        "wgmma.fence taken out",
        "multiply",
        "Between a chunk's products and the next one's nothing else touches the sums; the first fence is noticed",
    ),
    Reason(
        "a global (load|store) for all",
        "load_weights|kernel",
        "Of columns or rows that are all inside: the mask is always true",
    ),
    Reason(
        "a shared access for all|a comparison turned around",
        r"`(@%p (ld|st)\.shared|setp\.\w+\.b32 %p, %r, 0)",
        "Lanes of a warp that hold the same value store it to the same place, or load what is not used",
    ),
    Reason(
        "a shuffle's distance|a shuffle within half a warp",
        "max|sum",
        "One value of each warp, in the first lanes: in another order, or in half a warp, all of them meet as well",
    ),
    Reason(
        "a branch (never|always) taken",
        "kernel: `@%p bra",
        "Jumps over loops without an iteration, which are none here",
    ),
    Reason(
        "a comparison's border",
        r"ward(_kernel|\.py): `setp\.\w+\.s32",
        "No number meets the border (H is a whole number of tiles), or one more batch tile is run, which is all masked",
    ),
    Reason("a comparison's border", r"`setp\.\w+\.(f32|s64)", "No number meets the border"),
    Reason("a shift by one more", "cdiv|`shr.s32 %r, %r, 31", "A shift by 32 is one by 31: all are the sign"),
    Reason("a shift by one more", "kernel: `shl", "Of the batch tile's number, which is 0"),
    Reason(
        "a sum becomes a difference", r"kernel: `add\.s(32|64) %", "To the batch tile's number or address 0 is added"
    ),
    Reason(
        "a constant one more|a choice turned around",
        "load_weights|load_rows|kernel",
        "What masked elements are instead: there are none, or no result depends on them",
    ),
]


@functools.cache
def _functions(file: str) -> list[tuple[int, str]]:
    """(first line, name) of the functions of a file of the kernels', or of Triton's language."""
    folders = Path(kernels.__file__).parent, Path(triton.__file__).parent / "language"
    path = next((folder / file for folder in folders if (folder / file).exists()), None)
    lines = path.read_text().splitlines() if path else []
    return [(k, found[1]) for k, line in enumerate(lines, 1) if (found := re.match(r"def (\w+)", line))]


def where(row: Row) -> str:
    """`function: the PTX`, without numbers of lines and registers."""
    found = re.match(r"(?:(\d+ lines).*?)?(\w+\.py):(\d+) \(PTX line \d+: (.*)\)$", row.where)
    if found is None:
        return row.where
    names = [name for line, name in _functions(found[2]) if line <= int(found[3])]
    ptx = re.sub(r"(?<=%)(r|rs|rd|p)\d+", r"\1", re.sub(r"\s+", " ", found[1] or found[4]))
    return f"{names[-1] if names else found[2]}: `{ptx if len(ptx) < 70 else ptx[:66] + ' ..'}`"


def reason(row: Row) -> str:
    """Why nothing notices a mutant; "" if that is not known."""
    place = where(row)
    for it in REASONS:
        if re.search(it.mutation, row.mutation) and re.search(it.where, place):
            return it.text
    return ""


def table(rows: Iterable[Row]) -> str:
    """Markdown: how many mutants of each kind are noticed, and by what; and those that are not."""
    rows = sorted(rows, key=lambda row: row.group)
    kinds: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        kinds[row.group, row.mutation].append(row)
    weak = sum(row.memory == "weak" for row in rows)
    noticed = sum(bool(row.by) for row in rows)
    lines = [
        "# Mutants of the compiled kernels",
        "",
        "Small kernels, compiled, with one thing taken out or weakened, run in the emulator (`tests/ptx`). Made by",
        "`make ptx-mutants`; `tests/ptx/mutants.py` has the mutations, `tests/ptx/survivors.py` the reasons.",
        f"Of {len(rows)} mutants of {len({row.case for row in rows})} kernels, {noticed} are noticed,",
        f"{weak} of them only under weak memory (marked *). Of a mutation's many places some were taken. Kernels:",
        ", ".join(dict.fromkeys(row.case for row in rows)) + ".",
        "",
    ]
    group = None
    for (of, mutation), found in kinds.items():
        if of != group:
            group = of
            lines += ["", f"| {of[0].upper()}{of[1:]} | mutants | noticed | by |", "| --- | ---: | ---: | --- |"]
        by = Counter(row.by + "*" * (row.memory == "weak") for row in found if row.by)
        words = ", ".join(f"{kind} {n}" for kind, n in by.most_common())
        lines.append(f"| {mutation} | {len(found)} | {sum(by.values())} | {words} |")
    lines += ["", "## What nothing notices, and why", ""]
    left: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if not row.by:
            left[reason(row)].append(row)
    for why, found in sorted(left.items(), key=lambda item: (bool(item[0]), -len(item[1]))):
        lines.append(f"- {why or '**Not explained**'}")
        for (mutation, place), n in Counter((row.mutation, where(row)) for row in found).most_common(4 if why else 99):
            lines.append(f"  - {mutation}{f', {place}' if place else ''}{f' ({n} times)' if n > 1 else ''}")
        more = len({(row.mutation, where(row)) for row in found}) - 4
        if why and more > 0:
            lines.append(f"  - and {more} more")
    return "\n".join(lines)
