"""The way of a step through a compiled time loop, found in its control-flow graph.

Loops inside of the step's own: one with polled loads and neither a product nor a store is a wait, if every step comes
to it; if a step can pass it by, it loads again what was missing. One with a product goes through the chunks of a sum,
and runs as often as there are chunks. A step in time looks once in each wait, and loads nothing again.
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

    kind: "run"; "look", one iteration of a wait; "product", with the loads of its rows.
    """

    kind: str
    instructions: list[int]


@dataclasses.dataclass(frozen=True)
class Path:
    """A step in time. weights: the places of loads that belong to the product; what else is loaded is its input."""

    code: list[Instruction]
    pieces: list[Piece]
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
        self.sums = [loop for loop in inner if self._has(loop, product)]
        self.weights = frozenset(self._indices(_plain, self.sums))
        polling = [loop for loop in inner if self._has(loop, polled) and not self._has(loop, product, store)]
        again = [loop for loop in polling if self._avoidable(loop)]
        certain = [loop for loop in polling if loop not in again]
        self.waits = [loop for loop in certain if not any(loop.blocks < other.blocks for other in certain)]
        self.within = self.step.blocks - {block for loop in again for block in loop.blocks}
        # A loop that is left from its begin, as if it were left from its end
        self.exits = [
            (latch, after)
            for loop in self.waits + self.sums
            for latch in loop.latches
            for after in graph.after[loop.header]
            if after not in loop.blocks
        ]

    def _has(self, loop: Loop, *wanted: Callable[[Instruction], bool]) -> bool:
        return any(self.graph.count(b, test) for b in loop.blocks for test in wanted)

    def _indices(self, wanted: Callable[[Instruction], bool], loops: list[Loop]) -> Iterable[int]:
        blocks = {block for loop in loops for block in loop.blocks}
        return (k for b in blocks for k in range(b, self.graph.ends[b]) if wanted(self.graph.code[k]))

    def _avoidable(self, loop: Loop) -> bool:
        """Whether a way through the step does not come to a loop."""
        rest = self.step.blocks - {loop.header}
        return self.step.header in rest and bool(self.graph.reachable(self.step.header, rest) & self.step.latches)

    def path(self) -> Path:
        blocks = self._in_time()
        looks = [[block for block in blocks if block in wait.blocks] for wait in self.waits]
        looks = sorted(filter(None, looks), key=lambda look: blocks.index(look[0]))
        multiplied = [k for k, block in enumerate(blocks) if block in self.products]
        if multiplied:
            waited = (blocks.index(look[-1]) + 1 for look in looks)
            begin = max((end for end in waited if end <= multiplied[0]), default=multiplied[0])
            multiplied = list(range(begin, multiplied[-1] + 1))
        return Path(self.graph.code, self._cut(blocks, looks, [blocks[k] for k in multiplied]), self.weights)

    def _in_time(self) -> list[Block]:
        """From the step's begin to its end: all loads and stores, by the shortest way."""
        graph = self.graph

        def most(block: Block) -> Weight:
            return (graph.count(block, _moves), block - graph.ends[block])

        ways = []
        for latch in self.step.latches:
            through = [self.step.header, *self.products[:1], latch]
            parts = [graph.best_way(a, b, self.within, most, self.exits) for a, b in itertools.pairwise(through)]
            found = [part for part in parts if part]
            if len(found) == len(parts):
                ways.append(found[0] + [block for part in found[1:] for block in part[1:]])
        if not ways:
            raise NoStepError("no way leads through the time loop")
        return max(ways, key=lambda way: sum(graph.count(block, store) for block in way))

    def _cut(self, blocks: list[Block], looks: list[list[Block]], multiplied: list[Block]) -> list[Piece]:
        places = [("look", k) for k in range(len(looks))]
        of_block = {block: place for place, look in zip(places, looks, strict=True) for block in look}
        of_block |= dict.fromkeys(multiplied, ("product", 0))
        runs = itertools.groupby(blocks, key=lambda block: of_block.get(block, ("run", 0)))
        return [Piece(kind, self._expanded(run)) for (kind, _), run in runs]

    def _expanded(self, blocks: Iterable[Block]) -> list[int]:
        """The instructions of blocks, with loops over chunks repeated."""

        def over_chunks(block: Block) -> int | None:
            return next((k for k, loop in enumerate(self.sums) if block in loop.blocks), None)

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
