"""Mutations of a kernel: each takes out or weakens one thing, which the emulator or the results must show.

Most change one line of the PTX. A few change the kernels' Python, where one of its words is several instructions, or
what the host does before a launch.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.runtime import JITFunction

from triton_lstm.kernels import backward, exchange, forward, launch, parts
from triton_lstm.kernels import product as products
from triton_lstm.kernels.segments import as_bits, begin_segment, load_resets


class Place(NamedTuple):
    """Where a mutation is made: a line of the PTX with its text and its place in the kernel's Python."""

    line: int
    text: str
    source: str

    def __str__(self) -> str:
        return f"{self.source} (PTX line {self.line}: {self.text})"


class Mutation(NamedTuple):
    """Of the PTX: `pattern` becomes `replacement` in one line, or in all lines at once.

    group: what kind of thing is weakened.
    """

    group: str
    name: str
    pattern: str
    replacement: str | Callable[[re.Match[str]], str]
    everywhere: bool = False

    def places(self, ptx: str) -> list[Place]:
        """All lines that the mutation changes."""
        return [place for place in _lines(ptx) if self._changed(place.text) != place.text]

    def apply(self, ptx: str, *places: Place) -> str:
        lines = ptx.splitlines()
        for place in places:
            lines[place.line - 1] = self._changed(place.text)
        return "\n".join(lines)

    def mutants(self, ptx: str) -> Iterator[tuple[str, str]]:
        """(where, the mutated PTX)"""
        places = self.places(ptx)
        if self.everywhere and places:
            yield f"{len(places)} lines, the first {places[0]}", self.apply(ptx, *places)
        elif not self.everywhere:
            for place in places:
                yield str(place), self.apply(ptx, place)

    @property
    def most(self) -> int:
        """How many mutants of a kernel are enough."""
        if self.name in (LONE_ELEMENT, "bar.sync of a warp only", "bar.sync under a condition"):
            return 3
        return {ORDER: 99, LOOK: 3, WARPS: 99, ASYNC: 99, CONTROL: 3, NUMBERS: 2}.get(self.group, 2)

    def _changed(self, line: str) -> str:
        return re.sub(self.pattern, self.replacement, line, count=1)


def _lines(ptx: str) -> Iterator[Place]:
    """The instructions."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"[^"]*?([^/"]+)"', ptx))
    source, inside = "?", False
    for number, line in enumerate(ptx.splitlines(), 1):
        text = line.split("//")[0].strip()
        inside = inside or text == "{"
        if text.startswith(".section"):
            return
        if found := re.match(r"\.loc\s+(\d+) (\d+)", text):
            source = f"{files.get(found[1], '?')}:{found[2]}"
        elif inside and text.endswith(";") and not text.startswith("."):
            yield Place(number, text, source)


def swapped(found: re.Match[str]) -> str:
    """The second group and the fourth change places."""
    first, a, between, b, *rest = found.groups()
    return "".join([first, b, between, a, *rest])


def further(found: re.Match[str]) -> str:
    """An address 16 bytes further: as aligned as before."""
    return f"{found[1]}+{int(found[2] or 0) + 16}{found[3]}"


def one_more(found: re.Match[str]) -> str:
    return f"{found[1]}{int(found[2]) + 1};"


def other_bit(found: re.Match[str]) -> str:
    return f"{found[1]}{int(found[2]) ^ 1}{found[3]}"


def compared(found: re.Match[str], **otherwise: str) -> str:
    return f"setp.{otherwise[found[1]]}."


turned = functools.partial(compared, lt="ge", gt="le", eq="ne")
beyond = functools.partial(compared, lt="le", gt="ge", le="lt", ge="gt")

PROTOCOL, ORDER, LOOK, WARPS, ASYNC, MEMORY, PRODUCT, CONTROL, NUMBERS = (
    "the exchanges' Python",
    "order between programs",
    "what the flag exchange looks at",
    "order between warps",
    "asynchronous products",
    "memory",
    "tensor cores and shuffles",
    "control",
    "numbers",
)
LONE_ELEMENT = "a register of rows is not looked at"
GUARD = r"^(?:@!?%p\d+ )?"
LOAD, STORE = rf"{GUARD}ld\.[\w.]*global", rf"{GUARD}st\.[\w.]*global"
SHARED_LOAD, SHARED_STORE = (rf"{GUARD}(?:{name})[\w.]*shared[\w.:]*" for name in (r"ld\.|ldmatrix", r"st\.|stmatrix"))
ADDRESS = r"\[\s*[%\w]+)(?:\s*\+\s*(\d+))?(\s*\])"  # after the first group's beginning

UNCHANGED = Mutation(ORDER, "unchanged", "(?!)", "")
TEXT = [
    # Who sees whose stores
    Mutation(ORDER, "a volatile load is plain", r"ld\.volatile\.global", "ld.global"),
    Mutation(ORDER, "all volatile loads are plain", r"ld\.volatile\.global", "ld.global", True),
    Mutation(ORDER, "a volatile load is .cg", r"ld\.volatile\.global", "ld.global.cg"),
    Mutation(ORDER, "all volatile loads are .cg", r"ld\.volatile\.global", "ld.global.cg", True),
    Mutation(ORDER, "a volatile load's scope is its program", r"ld\.volatile\.global", "ld.relaxed.cta.global"),
    Mutation(ORDER, "release becomes relaxed", r"(atom\.global\.gpu)\.release", r"\1.relaxed"),
    Mutation(ORDER, "release becomes acquire", r"(atom\.global\.gpu)\.release", r"\1.acquire"),
    Mutation(ORDER, "the release's scope is its program", r"(atom\.global)\.gpu\.release", r"\1.cta.release"),
    Mutation(ORDER, "acquire becomes relaxed", r"ld\.acquire", "ld.relaxed"),
    Mutation(ORDER, "acquire becomes volatile", r"ld\.acquire\.gpu\.global", "ld.volatile.global"),
    Mutation(ORDER, "acquire becomes a plain load", r"ld\.acquire\.gpu\.global", "ld.global"),
    Mutation(ORDER, "the acquire's scope is its program", r"ld\.acquire\.gpu", "ld.acquire.cta"),
    Mutation(ORDER, "both scopes are the program", r"(ld\.acquire|atom\.global)\.gpu", r"\1.cta", True),
    Mutation(ORDER, "every thread arrives", r"^@%p\d+ (atom\.global\.gpu\.rel)", r"\1"),
    Mutation(ORDER, "the rows' loads may be cached", r"ld\.global\.cg", "ld.global"),
    # What decides that rows are complete
    Mutation(LOOK, LONE_ELEMENT, r"^or\.b32 %found.*", ""),
    Mutation(LOOK, "no register of rows is looked at", r"^or\.b32 %found.*", "", True),
    Mutation(LOOK, "what is missing is loaded again once", r"^bra LOOK\d+;", ""),
    Mutation(LOOK, "what is missing is not loaded again", r"^@%again ld\.volatile.*", ""),
    # Barriers and what else orders warps
    Mutation(WARPS, "bar.sync taken out", r"^bar\.sync.*", ""),
    Mutation(WARPS, "bar.sync of a warp only", r"^bar\.sync.*", "bar.warp.sync -1;"),
    Mutation(WARPS, "bar.sync under a condition", r"^bar\.sync", "@%p1 bar.sync"),
    Mutation(WARPS, "bar.warp.sync taken out", r"^bar\.warp\.sync.*", ""),
    # wgmma
    Mutation(ASYNC, "fence.proxy.async taken out", r"^fence\.proxy\.async.*", ""),
    Mutation(ASYNC, "wgmma.fence taken out", r"^wgmma\.fence.*", ""),
    Mutation(ASYNC, "commit_group taken out", r"^wgmma\.commit_group.*", ""),
    Mutation(ASYNC, "wait_group taken out", r"^wgmma\.wait_group.*", ""),
    Mutation(ASYNC, "wait_group 0 becomes 1", r"^(wgmma\.wait_group\S*)\s+0;", r"\1 1;"),
    Mutation(ASYNC, "the sums so far are not added", r"^(wgmma\.mma_async.*), (%p\d+), 1, 1,", r"\1, 0, 1, 1,"),
    Mutation(ASYNC, "sums that were not made are added", r"^(wgmma\.mma_async.*), 0, 1, 1,", r"\1, 1, 1, 1,"),
    Mutation(ASYNC, "B's layout turned around", r"^(wgmma\.mma_async.*, )([01])(;)", other_bit),
    # Addresses and masks
    Mutation(MEMORY, "a global load's address", rf"({LOAD}.*{ADDRESS}", further),
    Mutation(MEMORY, "a global store's address", rf"({STORE}.*{ADDRESS}", further),
    Mutation(MEMORY, "a global load for all", r"^@!?%p\d+ (ld\.[\w.]*global)", r"\1"),
    Mutation(MEMORY, "a global store for all", r"^@!?%p\d+ (st\.[\w.]*global)", r"\1"),
    Mutation(MEMORY, "a global load for the others", r"^@(%p\d+ ld\.[\w.]*global)", r"@!\1"),
    Mutation(MEMORY, "a global store for the others", r"^@(%p\d+ st\.[\w.]*global)", r"@!\1"),
    Mutation(MEMORY, "a global load taken out", rf"{LOAD}.*", ""),
    Mutation(MEMORY, "a global store taken out", rf"{STORE}.*", ""),
    Mutation(MEMORY, "a shared load's address", rf"({SHARED_LOAD}.*{ADDRESS}", further),
    Mutation(MEMORY, "a shared store's address", rf"({SHARED_STORE}.*{ADDRESS}", further),
    Mutation(MEMORY, "a shared store taken out", rf"{SHARED_STORE}.*", ""),
    Mutation(MEMORY, "a shared access for all", r"^@!?%p\d+ ((?:ld|st)[\w.]*shared)", r"\1"),
    # Operands of the tensor cores, and exchanges within a warp
    Mutation(PRODUCT, "ldmatrix without .trans", r"^(ldmatrix.*)\.trans", r"\1"),
    Mutation(PRODUCT, "ldmatrix with .trans", r"^(ldmatrix.*\.x\d)(\.shared)", r"\1.trans\2"),
    Mutation(PRODUCT, "rows of A exchanged", r"^(mma.*?\}, \{ )(%\w+)(, )(%\w+)(.*)", swapped),
    Mutation(PRODUCT, "B's halves exchanged", r"^(mma.*?\}, \{.*?\}, \{ )(%\w+)(, )(%\w+)(.*)", swapped),
    Mutation(PRODUCT, "B is A", r"^(mma.*?\}, \{ )(%\w+, %\w+)(.*?\}, \{ )(%\w+, %\w+)", r"\1\2\3\2"),
    Mutation(PRODUCT, "mma taken out", r"^mma\..*", ""),
    Mutation(PRODUCT, "a shuffle's distance", r"^(shfl\.sync\.bfly.*, )(\d+)(, 31, -1;)", other_bit),
    Mutation(PRODUCT, "a shuffle within half a warp", r"^(shfl\.sync.*), 31, -1;", r"\1, 0x100f, -1;"),
    Mutation(PRODUCT, "a shuffle of some lanes", r"^(shfl\.sync.*), -1;", r"\1, 0x0000ffff;"),
    Mutation(PRODUCT, "min of a warp becomes max", r"^redux\.sync\.min", "redux.sync.max"),
    # Branches and what decides them
    Mutation(CONTROL, "a branch turned around", r"^@(%\w+ bra)", r"@!\1"),
    Mutation(CONTROL, "a branch never taken", r"^@!?%\w+ bra.*", ""),
    Mutation(CONTROL, "a branch always taken", r"^@!?%\w+ (bra)", r"\1"),
    Mutation(CONTROL, "a comparison turned around", r"^setp\.(lt|gt|eq)\.", turned),
    Mutation(CONTROL, "a comparison's border", r"^setp\.(lt|gt|le|ge)\.", beyond),
    # Arithmetic
    Mutation(NUMBERS, "a sum becomes a difference", r"^add\.(f32|rn\.f32|s32|s64)", r"sub.\1"),
    Mutation(NUMBERS, "a product becomes a sum", r"^mul\.f32", "add.f32"),
    Mutation(NUMBERS, "fma's factor and term exchanged", r"^(fma\.rn\.f32\s+.*, )(\w+|%\w+)(, )([%\w]+)(;)", swapped),
    Mutation(NUMBERS, "a choice turned around", r"^(selp\S+\s+%\w+, )([%\w-]+)(, )([%\w-]+)(, .*)", swapped),
    Mutation(NUMBERS, "rounded towards zero", r"^cvt\.rn\.", "cvt.rz."),
    Mutation(NUMBERS, "a shift by one more", r"^(sh[lr]\.\S+\s+%\w+, %\w+, )(\d+);", one_more),
    Mutation(NUMBERS, "a constant one more", r"^(mov\.b(?:16|32|64)\s+%\w+, )(-?\d+);", one_more),
    Mutation(NUMBERS, "or becomes and", r"^or\.", "and."),
    Mutation(NUMBERS, "exp2 taken out", r"^ex2\.\S+\s+(%\w+), (%\w+);", r"mov.b32 \1, \2;"),
]


class Source(NamedTuple):
    """Of the kernels' Python: `old`, a regular expression that is there once, becomes `new` in `function`.

    exchange: for which plans: "flag", "barrier", "parts" or "parts by flag"; "segments": with resets.
    """

    exchange: str
    name: str
    function: Any
    old: str
    new: str
    group: str = PROTOCOL
    most: int = 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block kernels are compiled with the mutation."""
        before = self.function.src
        after, count = re.subn(self.old, self.new, before, flags=re.MULTILINE)
        if count != 1:
            raise LookupError(f"{self.name}: {self.old!r} is {count} times in {self.function.fn.__name__}, not once")
        try:
            self._set(after)
            yield
        finally:
            self._set(before)

    def _set(self, text: str) -> None:
        self.function._unsafe_update_src(text)
        for module in (products, exchange, forward, backward):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.hash = None  # of a function and all that it calls


class Host(NamedTuple):
    """Of what the host does before a launch: `function` of triton_lstm.kernels.exchange is another one."""

    exchange: str
    name: str
    function: str
    new: Callable[..., Any]
    group: str = PROTOCOL
    most: int = 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        owner = launch if hasattr(launch, self.function) else exchange
        with mock.patch.object(owner, self.function, self.new):
            yield


def _fill_in_part(buffer: torch.Tensor, fill: Callable[..., None] = exchange.fill_with_sentinel) -> None:
    fill(buffer)
    buffer[1, ..., -16:] = 0


def _counters_as_they_are(kind: str, buffer: torch.Tensor, signals: Any, words: torch.Tensor | None) -> Any:
    exchange.make_ready(kind, buffer, words)
    return signals


def _words_of_two_steps(kind: str, buffer: torch.Tensor, signals: torch.Tensor | None, words: torch.Tensor) -> None:
    """As a launch of two steps leaves them."""
    exchange.make_ready(kind, buffer, signals)
    words.copy_((torch.tensor([1, 2]) << 32 | 0x3F800000).view(2, 1, 1, 1, 1))


POINTER = "tl.pointer_type(tl.int32), bitcast=True"
STORED_APART = rf"""place = \1
    tl.store(place.to({POINTER}), word.to(tl.int32))
    tl.store(place.to({POINTER}) + 1, (word >> 32).to(tl.int32))"""
LOADED_APART = rf"""half = (\1).to({POINTER})
            seen = tl.load(half + 1, volatile=True).to(tl.int64) << 32
            seen |= tl.load(half, volatile=True).to(tl.int64) & 0xFFFFFFFF"""
add_parts = parts.add_parts
product = exchange.recurrent_product
_rows_at = products._rows_at
PYTHON: list[Source | Host] = [
    Host("flag", "the buffer is not filled", "fill_with_sentinel", lambda buffer: None),
    Host("flag", "the buffer is filled with 0", "fill_with_sentinel", lambda buffer: buffer.zero_()),
    Host("flag", "the end of a step's rows is filled with 0", "fill_with_sentinel", _fill_in_part),
    Source("flag", "nothing is looked at again", exchange.multiply, r"(PRESENT: tl.constexpr) = .*", r"\1 = False"),
    Source("flag", "complete from the first step on", product, r"target == 0", "target >= 0"),
    Source("flag", "the sentinel may be stored", exchange.store_unlike_sentinel, r"SENTINEL - 1", "SENTINEL"),
    Host("barrier", "the counter is not zeroed", "make_ready", _counters_as_they_are),
    Host("barrier", "the counter starts at 1", "make_ready", lambda *given: _counters_as_they_are(*given).fill_(1)),
    Source("barrier", "no barrier before arrive", exchange.arrive, r"tl.debug_barrier\(\)", "pass"),
    Source("barrier", "arrive adds 2", exchange.arrive, r"LINE, 1", "LINE, 2"),
    Source("barrier", "one copy is not told", exchange.arrive, r"arange\(0, COPIES", "arange(0, COPIES // 2"),
    Source("barrier", "arrive adds 0", exchange.arrive, r"LINE, 1", "LINE, 0"),
    Source("barrier", "arrive does not release", exchange.arrive, r"release", "relaxed"),
    Source("barrier", "arrive releases to its program", exchange.arrive, r"gpu", "cta"),
    Source("barrier", "wait's target is one less", exchange.wait, r"_ptr, target, ORD", "_ptr, target - 1, ORD"),
    Source("barrier", "wait's target is one more", exchange.wait, r"_ptr, target, ORD", "_ptr, target + 1, ORD"),
    Source("barrier", "wait does not acquire", exchange.wait, r"acquire", "relaxed"),
    Source("segments", "where a segment begins nobody waits", product, r"all_begin\(.*\), 0, t", "segments != 0, 0, t"),
    Source("segments", "rows before a segment are read", _rows_at, r"mask & ~begin.*", "mask & (row >= 0)"),
    Source("segments", "a bit of another row", begin_segment, r">> rows", ">> (rows ^ 1)"),
    Source("segments", "of every second row", as_bits, r"<< tl.arange\(0, BLOCK_B\)", "<< (tl.arange(0, BLOCK_B) | 1)"),
    Source("segments", "of the row before", load_resets, r"resets_ptr \+ start", "resets_ptr - 1 + start"),
    Host("parts", "words are not cleared", "make_ready", lambda *most: exchange.make_ready(*most[:-1])),
    Host("parts", "words of a launch before are left", "make_ready", _words_of_two_steps),
    Source("parts", "a word's number is not compared", add_parts, r"!= number\)", "== -1)"),
    Source("parts", "the number of two steps before will do", add_parts, r"!= number\)", "< number - 2)"),
    Source("parts", "parts are looked at once", add_parts, r"n = tl.where\(late.*", "n = LAST"),
    Source("parts by flag", "words of one step", add_parts, r"\(2 \* tile \+ step % 2\)", "(2 * tile)"),
    Source("parts", "parts are added in another order", add_parts, r"own \+ k \*", "own + (SPLITS - 1 - k) *"),
    Source("parts", "a part of another split", add_parts, r"own \+ k \*", "own + k // 2 *"),
    Source("parts", "a word is stored in halves", add_parts, r"tl.store\((.*), word\)", STORED_APART),
    Source("parts", "a word is loaded in halves", add_parts, r"seen = tl.load\((.*), volatile=True\)", LOADED_APART),
]
