"""The way of a step through a compiled time loop, found in its control-flow graph.

Loops inside of the step's own: one with polled loads and neither a product nor a store is a wait; one that comes back
to a product is the retry; one that only goes through the chunks of a sum is neither, and runs as often as there are
chunks. A step that succeeds at once passes each wait once, the product, the longest check of it and all stores; what
polls again after the product, inside of the retry, is for steps that fail.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable

from triton_lstm.perf.step.graph import Block, Graph, Loop, Weight
from triton_lstm.perf.step.machine_code import PRODUCTS, Instruction


class NoStepError(ValueError):
    """Machine code in which no time step was found; the text says what is missing."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Instructions, as indices, that a step runs one after another.

    kind: "run"; "look", one iteration of a wait; "attempt", the product and the check of it.
    """

    kind: str
    instructions: list[int]


@dataclasses.dataclass(frozen=True)
class Path:
    """A step.

    pieces: of a step that succeeds at once. failures: of an attempt that fails, by whether it then looks for what is
    missing ("missing") or not ("quick"), from its begin until it is back. again: the pieces from there to the end of an
    attempt that succeeds; after "missing" it needs no check. weights: the places of loads that belong to the product;
    what else a step loads once is its input.
    """

    code: list[Instruction]
    pieces: list[Piece]
    failures: dict[str, Piece]
    again: dict[str, list[Piece]]
    weights: frozenset[int]


def step_instructions(code: list[Instruction]) -> list[Instruction]:
    """All instructions of the time loop's body, whatever way a step takes. Raises NoStepError."""
    graph = _graph(code)
    return graph.instructions(sorted(_step_loop(graph).blocks))


def find_path(code: list[Instruction], chunks: int = 1) -> Path:
    """The step of a kernel's code. chunks: how often a loop over the parts of a sum runs.

    Raises NoStepError where there is no loop with a store, or no way through it.
    """
    return _Finder(_graph(code), chunks).path()


def _graph(code: list[Instruction]) -> Graph:
    if not code:
        raise NoStepError("there is no loop with a store: there is no code")
    return Graph(code)


def product(instruction: Instruction) -> bool:
    return instruction.kind in PRODUCTS


def store(instruction: Instruction) -> bool:
    return instruction.kind == "store"


def polled(instruction: Instruction) -> bool:
    return instruction.strong


def _plain(instruction: Instruction) -> bool:
    return instruction.kind == "load" and not instruction.strong


def _moves(instruction: Instruction) -> bool:
    return instruction.kind in ("load", "store", "atomic")


class _Finder:
    def __init__(self, graph: Graph, chunks: int) -> None:
        self.graph, self.chunks = graph, chunks
        self.step = _step_loop(graph)
        inner = graph.inner(self.step)
        self.products = sorted((b for b in self.step.blocks if graph.count(b, product)), key=graph.rank.__getitem__)
        sums = [loop for loop in inner if self._sums(loop)]
        self.retries = self._retries(inner, sums)
        self.weights = frozenset(self._indices(_plain, [loop for loop in inner if self._has(loop, product)]))
        self.copies = self._copies()
        self.retried = self._retried()
        polling = [loop for loop in inner if self._has(loop, polled) and not self._has(loop, product, store)]
        self.waits = [
            loop
            for loop in polling
            if loop.header not in self.retried and not any(loop.blocks < other.blocks for other in polling)
        ]
        # What looks for missing rows, or waits for all of them, goes through the chunks as well
        self.over_chunks = sums + [loop for loop in polling if loop not in self.waits and not graph.inner(loop)]
        # A loop that is left from its begin, as if it were left from its end
        self.exits = [
            (latch, after)
            for loop in self.waits + self.over_chunks
            for latch in loop.latches
            for after in graph.after[loop.header]
            if after not in loop.blocks
        ]

    def _has(self, loop: Loop, *wanted: Callable[[Instruction], bool]) -> bool:
        return any(self.graph.count(b, test) for b in loop.blocks for test in wanted)

    def _indices(self, wanted: Callable[[Instruction], bool], loops: list[Loop]) -> Iterable[int]:
        blocks = {block for loop in loops for block in loop.blocks}
        return (k for b in blocks for k in range(b, self.graph.ends[b]) if wanted(self.graph.code[k]))

    def _sums(self, loop: Loop) -> bool:
        """Whether a loop goes through chunks of a product whose weights it loads; a retry has a choice inside."""
        straight = all(len(loop.blocks.intersection(self.graph.after[block])) == 1 for block in loop.blocks)
        return self.chunks > 1 and straight and self._has(loop, product) and self._has(loop, _plain)

    def _retries(self, inner: list[Loop], sums: list[Loop]) -> list[Loop]:
        """The loops that come back to a product, the first one first."""
        again = [loop for loop in inner if self._has(loop, product) and loop not in sums]
        found: dict[Block, Loop] = {}
        for loop in again:
            if loop.header not in found:  # the largest of those that begin together, without the others' jumps
                others = [other.latches for other in inner if other.header == loop.header and other not in again]
                found[loop.header] = dataclasses.replace(loop, latches=loop.latches.difference(*others))
        return sorted(found.values(), key=lambda loop: self.graph.rank[loop.header])

    def _copies(self) -> set[Block]:
        """Products that a step which succeeds at once does not come to, before it has stored anything."""
        graph, first = self.graph, next(iter(self.products), None)
        if first is None:
            return set()
        stores = {b for b in self.step.blocks if graph.count(b, store) and b not in self.products}
        near = graph.reachable(first, self.step.blocks - stores)
        return {
            block
            for block in near.intersection(self.products[1:])
            if graph.reachable(first, self.step.blocks - {block}) & self.step.latches
        }

    def _retried(self) -> set[Block]:
        """The blocks from a product on that another attempt may follow."""
        graph, found = self.graph, set[Block]()
        for loop in self.retries:
            found |= graph.reachable(next(b for b in self.products if b in loop.blocks), loop.blocks)
        if self.copies:
            for block in graph.reachable(self.products[0], self.step.blocks):
                if (graph.reachable(block, self.step.blocks) - {block}) & self.copies:
                    found.add(block)
        return found

    def path(self) -> Path:
        blocks = self._successful()
        looks = [[block for block in blocks if block in wait.blocks] for wait in self.waits]
        looks = sorted(filter(None, looks), key=lambda look: blocks.index(look[0]))
        if not self.products:
            return Path(self.graph.code, self._cut(blocks, looks, []), {}, {}, self.weights)
        first = blocks.index(self.products[0])
        retry = self._retry()
        start = blocks.index(retry.header) if retry and retry.header in blocks else first
        waited = [blocks.index(look[-1]) + 1 for look in looks]
        begin = max([start] + [end for end in waited if end <= first])
        end = 1 + first
        while end < len(blocks) and (blocks[end] in self.retried or blocks[end] in self.products):
            end += 1
        failures, again = {}, {}
        for kind in ("quick", "missing"):
            if retry is None or end == len(blocks):
                break
            failed = self._failed(retry, kind == "missing")
            back = self._again(retry, blocks[end], kind == "quick")
            if failed and back:
                failures[kind] = Piece("attempt", self._expanded(blocks[begin:first] + failed))
                looked = list(filter(None, ([block for block in back if block in look] for look in looks)))
                after = max([back.index(look[-1]) + 1 for look in looked], default=0)
                again[kind] = self._cut(back, looked, back[after:])
        return Path(self.graph.code, self._cut(blocks, looks, blocks[begin:end]), failures, again, self.weights)

    def _retry(self) -> Loop | None:
        """Where the first product is tried again."""
        first = self.products[0]
        near = [loop for loop in self.retries if first in loop.blocks or loop.blocks & self.copies]
        return near[0] if near else None

    def _successful(self) -> list[Block]:
        """From the step's begin to its end."""
        graph, within = self.graph, self.step.blocks

        def most(block: Block) -> Weight:
            """All loads and stores, by the shortest way."""
            return (graph.count(block, _moves), block - graph.ends[block])

        def checked(block: Block) -> Weight:
            """The same, after the longest of all checks of the product."""
            return (0, graph.ends[block] - block) if block in self.retried else most(block)

        ways = []
        for latch in self.step.latches:
            if not self.products:
                way = graph.best_way(self.step.header, latch, within, most, self.exits)
            else:
                to = graph.best_way(self.step.header, self.products[0], within, most, self.exits)
                rest = graph.best_way(
                    self.products[0], latch, within - self._looks() - self.copies, checked, self.exits
                )
                way = to + rest[1:] if to and rest else None
            if way:
                ways.append(way)
        if not ways:
            raise NoStepError("no way leads through the time loop")
        return max(ways, key=lambda way: sum(graph.count(block, store) for block in way))

    def _looks(self) -> set[Block]:
        """What only a step that fails comes to: looks at the rows after the product."""
        return {b for b in self.retried if self.graph.count(b, polled) and b not in self.products}

    def _failed(self, retry: Loop, missing: bool) -> list[Block] | None:
        """From the product back to the retry; with a look for what is missing, or the shortest way without."""
        graph, header, first = self.graph, retry.header, self.products[0]

        def weight(block: Block) -> Weight:
            return (graph.count(block, polled) if missing else 0, block - graph.ends[block])

        within = self.step.blocks - (set() if missing else self._looks())
        ends = set(retry.latches & self.retried)
        if first not in retry.blocks:  # it is a copy in front of the loop
            ends = set(graph.before[header]) - retry.latches
        ways = (graph.best_way(first, end, within, weight, self.exits) for end in ends)
        found = [way for way in ways if way and any(b in self._looks() for b in way) == missing]
        return min(found, key=len, default=None)

    def _again(self, retry: Loop, end: Block, check: bool) -> list[Block] | None:
        """From the retry's begin to where a successful attempt goes on."""
        graph, within = self.graph, retry.blocks
        first = next(b for b in self.products if b in within)

        def most(block: Block) -> Weight:
            return (graph.count(block, polled), block - graph.ends[block])

        def leave(block: Block) -> Weight:
            length = graph.ends[block] - block
            return (length if check and block in self.retried else -length,)

        to = graph.best_way(retry.header, first, within, most, self.exits)
        rest = graph.best_way(first, end, within - self._looks(), leave, self.exits)
        return to + rest[1:-1] if to and rest else None

    def _cut(self, blocks: list[Block], looks: list[list[Block]], attempt: list[Block]) -> list[Piece]:
        places = [("look", k) for k in range(len(looks))]
        of_block = {block: place for place, look in zip(places, looks, strict=True) for block in look}
        of_block |= dict.fromkeys(attempt, ("attempt", 0))
        runs = itertools.groupby(blocks, key=lambda block: of_block.get(block, ("run", 0)))
        return [Piece(kind, self._expanded(run)) for (kind, _), run in runs]

    def _expanded(self, blocks: Iterable[Block]) -> list[int]:
        """The instructions of blocks, with loops over chunks repeated."""

        def over_chunks(block: Block) -> int | None:
            return next((k for k, loop in enumerate(self.over_chunks) if block in loop.blocks), None)

        found: list[int] = []
        for loop, run in itertools.groupby(blocks, key=over_chunks):
            once = [k for block in run for k in range(block, self.graph.ends[block])]
            found += once * (1 if loop is None else self.chunks)
        return found


def _step_loop(graph: Graph) -> Loop:
    """The innermost loop with a store and, if there is any, a product, and inputs that are loaded once a step."""
    wanted = [store, product] if any(map(product, graph.code)) else [store]
    loops = [loop for loop in graph.loops if all(any(graph.count(b, test) for b in loop.blocks) for test in wanted)]
    if not loops:
        raise NoStepError("there is no loop with a store, and with the matrix product if there is one")
    with_inputs = [loop for loop in loops if any(graph.count(b, _plain) for b in graph.own(loop))]
    return (with_inputs or loops)[-1]
