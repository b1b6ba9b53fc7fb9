"""The control-flow graph of machine code: blocks, loops, and the best way from one block to another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from triton_lstm.perf.step.machine_code import Instruction

Block = int  # the index of a block's first instruction
Weight = tuple[float, ...]  # compared from the left, added up along a way


@dataclasses.dataclass(frozen=True)
class Loop:
    """header: where every iteration begins. blocks: all of it, inner loops included. latches: jump back to it."""

    header: Block
    blocks: frozenset[Block]
    latches: frozenset[Block]


class Graph:
    """ends: the end of each block, by its begin. after, before: successors and predecessors. loops: inner ones last."""

    def __init__(self, code: list[Instruction]) -> None:
        self.code = code
        begins = {0}
        for k, instruction in enumerate(code):
            if instruction.target is not None:
                begins.add(instruction.target)
            if instruction.jumps and k + 1 < len(code):
                begins.add(k + 1)
        order = sorted(begins)
        self.ends = dict(zip(order, [*order[1:], len(code)], strict=True))
        self.after: dict[Block, list[Block]] = {}
        self.before: dict[Block, list[Block]] = {block: [] for block in order}
        for block, end in self.ends.items():
            last, after = code[end - 1], []
            if last.falls_through and end < len(code):
                after.append(end)
            if last.target is not None and last.target not in after:
                after.append(last.target)
            self.after[block] = after
            for successor in after:
                self.before[successor].append(block)
        self.order = self._reverse_post_order()
        self.rank = {block: k for k, block in enumerate(self.order)}
        self.loops = self._find_loops()
        self.back = {(latch, loop.header) for loop in self.loops for latch in loop.latches}

    def instructions(self, blocks: Iterable[Block]) -> list[Instruction]:
        return [self.code[k] for block in blocks for k in range(block, self.ends[block])]

    def count(self, block: Block, wanted: Callable[[Instruction], bool]) -> int:
        return sum(map(wanted, self.instructions([block])))

    def inner(self, loop: Loop) -> list[Loop]:
        """The loops inside of a loop, the outer ones first."""
        return [other for other in self.loops if other is not loop and other.blocks < loop.blocks]

    def own(self, loop: Loop) -> list[Block]:
        """A loop's blocks that are in no inner loop."""
        return sorted(loop.blocks.difference(*(other.blocks for other in self.inner(loop))))

    def reachable(self, begin: Block, within: Iterable[Block]) -> set[Block]:
        """What can be reached from a block, going forward only."""
        allowed, found, todo = set(within), {begin}, [begin]
        while todo:
            block = todo.pop()
            for successor in self.after[block]:
                forward = (block, successor) not in self.back
                if forward and successor in allowed and successor not in found:
                    found.add(successor)
                    todo.append(successor)
        return found

    def best_way(
        self,
        begin: Block,
        end: Block,
        within: Iterable[Block],
        weight: Callable[[Block], Weight],
        extra: Iterable[tuple[Block, Block]] = (),
    ) -> list[Block] | None:
        """The forward way with the greatest sum of weights, both ends included; None where there is no way.

        extra: edges that are followed as well, if they make no circle.
        """
        allowed = set(within) | {begin, end}
        others: dict[Block, list[Block]] = {}
        for source, to in extra:
            others.setdefault(source, []).append(to)
        best: dict[Block, tuple[Weight, Block | None] | None] = {end: (weight(end), None)}

        def visit(block: Block) -> tuple[Weight, Block | None] | None:
            """The weight from a block to the end, and the block that follows."""
            if block not in best:
                ways = []
                forward = [s for s in self.after[block] if (block, s) not in self.back]
                for successor in forward + others.get(block, []):
                    if successor in allowed and (rest := visit(successor)):
                        ways.append((tuple(a + b for a, b in zip(weight(block), rest[0], strict=True)), successor))
                best[block] = max(ways, default=None)
            return best[block]

        if not visit(begin):
            return None
        way = [begin]
        while way[-1] != end:
            found = best[way[-1]]
            assert found and found[1] is not None
            way.append(found[1])
        return way

    def _reverse_post_order(self) -> list[Block]:
        seen, order = {0}, []
        stack = [(0, iter(self.after[0]))]
        while stack:
            block, successors = stack[-1]
            for successor in successors:
                if successor not in seen:
                    seen.add(successor)
                    stack.append((successor, iter(self.after[successor])))
                    break
            else:
                stack.pop()
                order.append(block)
        return order[::-1]

    def _find_loops(self) -> list[Loop]:
        """Natural ones: of every jump to a block that is on all ways to where the jump stands; inner ones last."""
        dominators = {block: set(self.order) for block in self.order}
        dominators[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                before = [dominators[b] for b in self.before[block] if b in dominators]
                new = set.intersection(*before) | {block}
                if new != dominators[block]:
                    dominators[block], changed = new, True
        latches: dict[Block, list[Block]] = {}
        for block in self.order:
            for successor in self.after[block]:
                if successor in dominators[block]:
                    latches.setdefault(successor, []).append(block)
        loops = [loop for header, ends in latches.items() for loop in self._loops_at(header, ends)]
        return sorted(loops, key=lambda loop: -len(loop.blocks))

    def _loops_at(self, header: Block, latches: list[Block]) -> list[Loop]:
        """One loop, or several that begin together, one inside of the other."""
        bodies = sorted(((self._body(header, latch), latch) for latch in latches), key=lambda body: len(body[0]))
        loops: list[Loop] = []
        blocks: set[Block] = set()
        ends: set[Block] = set()
        for k, (body, latch) in enumerate(bodies):
            blocks, ends = blocks | body, ends | {latch}
            if k + 1 == len(bodies) or blocks < bodies[k + 1][0]:
                loops.append(Loop(header, frozenset(blocks), frozenset(ends)))
        return loops

    def _body(self, header: Block, latch: Block) -> set[Block]:
        """What can come to a latch without its header."""
        blocks, todo = {header, latch}, [latch] if latch != header else []
        while todo:
            for before in self.before[todo.pop()]:
                if before in self.rank and before not in blocks:
                    blocks.add(before)
                    todo.append(before)
        return blocks
