"""What orders the exchange of rows in compiled kernels: how they are loaded, the counter's atomics, the barriers."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

Row = dict[str, Any]
LOADS = {"flag": "ld.volatile.global.", "barrier": "ld.global.cg.", "none": "no load"}  # of the rows
AMD = r"atom\.agent\.acquire$", r"atom\.agent\.release$"  # once each on the counter
NVIDIA = r"ld\.{0}\.gpu\.global\.|(ld|atom)\.global\.gpu\.{0}\.(?!add)", r"(atom|red)\.global\.gpu\.{1}\.add\."
ORDERING = {"barrier": ("acquire", "release"), "flag": ("relaxed", "relaxed")}
BY_THREAD = r"ld\.(acquire|relaxed)\.gpu\.global\."  # every thread looks at the counter
SIGNAL = "st.global.b32"  # that a wait gave up, in the counters' tensor
TOLD, READ = r"st\.global\.(v2\.)?b64$", r"ld\.volatile\.global\.(v2\.)?b64$"  # words of parts.py, each seen at once


class Access(NamedTuple):
    """A barrier of all warps, or one access to memory: its instruction, and the kernel's arguments that its address is
    from."""

    opcode: str
    pointers: frozenset[str] = frozenset()


BARRIER = Access("barrier")


def ptx_accesses(ptx: str, arguments: list[str]) -> list[Access]:
    """Every barrier and access to global memory, in the order of the text. arguments: the kernel's, at run time."""
    instructions = re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(.*);", ptx, re.MULTILINE)
    held: dict[str, frozenset[str]] = {}  # by a register of 64 bits: the pointers that its value is made from
    before = None
    while held != before:  # a loop carries pointers back to instructions above
        before = dict(held)
        for opcode, operands in instructions:
            if parameter := re.match(r"(%rd\d+), \[\w+_param_(\d+)\]", operands):
                held[parameter[1]] = frozenset(arguments[int(parameter[2]) :][:1])
            elif re.match(r"(add|sub|mad|mov|selp|cvta|or)\b", opcode) and operands.startswith("%rd"):
                result, *sources = re.findall(r"%rd\d+", operands)
                held[result] = held.get(result, frozenset()).union(*(held.get(s, ()) for s in sources))
    found = []
    for opcode, operands in instructions:
        if re.match(r"bar(rier)?(\.cta)?\.(sync|red)", opcode):
            found.append(BARRIER)
        elif re.match(r"(ld|st|atom|red)\.(\w+\.)*global\b", opcode):
            address = re.search(r"\[\s*(%rd\d+)", operands)
            found.append(Access(opcode, held.get(address[1], frozenset()) if address else frozenset()))
    return found


def amd_accesses(llir: str) -> list[Access]:
    """Every barrier and access to global memory in LLVM's code; which argument's is told of atomics only."""
    found = []
    for line in llir.splitlines():
        if re.search(r"call void @llvm.amdgcn.s.barrier", line):
            found.append(BARRIER)
        elif atomic := re.search(r'atomicrmw \w+ ptr addrspace\(1\).* syncscope\("([\w-]+)"\) (\w+)', line):
            found.append(Access(f"atom.{atomic[1]}.{atomic[2]}", frozenset({"signals_ptr"})))
        elif re.search(r"\bstore .* ptr addrspace\(1\)|raw\.(ptr\.)?buffer\.store", line):
            found.append(Access("st"))
        elif re.search(r"= load .* ptr addrspace\(1\)|raw\.(ptr\.)?buffer\.load", line):
            found.append(Access("ld"))
    return found


def order(accesses: list[Access], rows: str, counter: str) -> str:
    """How the exchanged `rows` are ordered, a letter each: Acquire and reLease of the counter, or a look at it and an
    arrival that order nothing; Barrier, Read, Write.

    On AMD all that is loaded and stored: what follows `wait` are the rows, and what comes before `arrive` too.
    """
    letters = {"acquire": "A", "release": "L", "barrier": "B", "ld": "R", "st": "W"}
    letters_of_counter = {"acquire": "A", "release": "L", "ld": "A", "add": "L", "atom": "A"}
    found = ""
    for opcode, pointers in accesses:
        if opcode != SIGNAL if counter in pointers else rows in (pointers or {rows}):
            known = letters_of_counter if counter in pointers else letters
            found += next((letter for word, letter in known.items() if word in re.split(r"[.]", opcode)), "?")
    return found


def exchanged(compiled: Any, rows: str, counter: str = "signals_ptr") -> Row:
    """How a kernel reads its argument `rows`, through which programs see each other's, and what orders that.

    reads: how often each instruction loads from it, or from nobody knows where; none on AMD. counter: the instructions
    on the counter of arrivals. words: those on the parts of sums. order: see there.
    """
    arguments = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    nvidia = "ptx" in compiled.asm
    found = ptx_accesses(compiled.asm["ptx"], arguments) if nvidia else amd_accesses(compiled.asm["llir"])
    loads = [a for a in found if nvidia and a.opcode.startswith("ld")]
    reads = Counter(a.opcode for a in loads if rows in (a.pointers or {rows}))
    return {
        "reads": reads,
        "counter": [a.opcode for a in found if counter in a.pointers and a.opcode != SIGNAL],
        "words": Counter(a.opcode for a in found if "parts_ptr" in a.pointers),
        "order": order(found, rows, counter),
    }


def unordered(row: Row) -> list[str]:
    """What would let a program take rows, or words of parts, for complete that are not: every load, atomic and barrier
    is looked at.

    row["least_bytes"]: what each thread has to load of rows. row["again"]: and of them again, where they are missing,
    by loads of an row["element"]; 0 where the others load no more at a time.
    row["told"], row["read"]: bytes of words that it stores and loads.
    """
    wrong = []
    exchange, amd, reads = row["exchange"], row["arch"].startswith("gfx"), row["reads"]
    wanted = LOADS[exchange]
    seen = moved(reads)
    if not amd and (not all(read.startswith(wanted) for read in reads) or seen < row["least_bytes"]):
        wrong.append(f"rows are loaded by {dict(reads)}, wanted: {row['least_bytes']} bytes a thread by {wanted}")
    again = moved(reads, row["element"] + "$")
    if row["again"] and again != row["again"]:
        wrong.append(f"{again} bytes a thread are loaded again where they are missing, wanted: {row['again']}")
    words = {pattern: moved(row["words"], pattern) for pattern in (TOLD, READ)}
    whole = all(re.match(f"{TOLD}|{READ}", access) for access in row["words"])
    if not whole or list(words.values()) != [row["told"], row["read"]]:
        wanted = f"{row['told']} bytes a thread told and {row['read']} read, in whole words"
        wrong.append(f"parts are told and read by {dict(row['words'])}, wanted: {wanted}")
    looked, arrived = AMD if amd else (pattern.format(*ORDERING.get(exchange, "??")) for pattern in NVIDIA)
    once = [sum(bool(re.match(wanted, used)) for used in row["counter"]) for wanted in (looked, arrived)]
    right = (once, len(row["counter"])) == (([0, 0], 0) if exchange == "none" else ([1, 1], 2))
    if not right:
        wrong.append(f"the counter is used by {row['counter']}")
    order = 2 * row["order"]  # a loop, which the compiler may begin anywhere
    if exchange != "none" and not re.search("WB+L", order):
        wrong.append("no barrier of all warps between the rows' stores and `arrive`")
    # The first barrier hands out what one thread saw
    after = "AB*R" if any(re.match(BY_THREAD, used) for used in row["counter"]) else "ABB+R"
    if exchange == "barrier" and not re.search(after, order):
        wrong.append("no barrier of all warps between `wait` and the rows' loads")
    return wrong


def moved(accesses: Mapping[str, int], pattern: str = "") -> int:
    """Bytes of a thread, by instructions like `pattern`."""
    return sum(n * poll_bytes(width(opcode)) for opcode, n in accesses.items() if re.match(pattern, opcode))


def width(load: str) -> str:
    """v4.b32 of ld.volatile.global.v4.b32."""
    return re.search(r"(v\d\.)?[a-z]\d+$", load)[0]


def poll_bytes(width: str) -> int:
    """16 for v4.b32."""
    vector, bits = re.fullmatch(r"(?:v(\d)\.)?[a-z](\d+)", width).groups()
    return int(vector or 1) * int(bits) // 8
