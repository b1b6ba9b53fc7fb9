"""A step in its steady state: when its loads, looks and stores are on their way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from triton_lstm.perf.step.constants import Constants
from triton_lstm.perf.step.issue import Operation, issue, mean_by_reason
from triton_lstm.perf.step.machine_code import Instruction
from triton_lstm.perf.step.path import Path, Piece, polled, product, store
from triton_lstm.perf.step.waiting import Rest
from triton_lstm.planning.cost import beyond_l2
from triton_lstm.planning.limits import directions_at_once
from triton_lstm.planning.plan import Plan
from triton_lstm.planning.problem import Problem

PHASES = ("before the wait", "wait", "loads and product", "sums", "second wait", "gates to store", "rest")
WARM_UP = 2  # steps until warps have found their rhythm
LANES = 32
INSTRUCTIONS = 8  # of 16 bytes, in a line of the instruction cache


@dataclasses.dataclass(frozen=True)
class Loop:
    """What a time loop's machine code does not say.

    warps: of a program. programs: that exchange rows. sharing: programs on a processor. rounds: tiles that a program
    takes in turn. chunks: of the recurrent sum. from_memory: weights that are streamed do not fit L2. splits: how many
    programs, neighbours, add up the parts of one sum.
    """

    warps: int
    programs: int = 1
    sharing: int = 1
    rounds: int = 1
    chunks: int = 1
    from_memory: bool = False
    splits: int = 1

    @classmethod
    def of(cls, problem: Problem, plan: Plan) -> Loop:
        programs = plan.grid(problem.H)[0]
        at_once = programs * plan.groups * directions_at_once(problem, plan)
        return cls(
            warps=plan.warps,
            programs=programs,
            sharing=-(-at_once // problem.device.processors),
            rounds=-(-problem.B // (plan.block_b * plan.groups)),
            chunks=plan.sum_length(problem) // plan.block_k,
            from_memory=beyond_l2(problem),
            splits=plan.splits,
        )


class Timeline:
    """A step's pieces, simulated again and again; times are from the step's begin, of the last warp."""

    def __init__(self, path: Path, pieces: Sequence[Piece], loop: Loop, constants: Constants) -> None:
        self.path, self.pieces, self.loop, self.constants = path, list(pieces), loop, constants
        self.starts: list[int] = []
        self.trace: list[Operation] = []
        multiplied = False
        for piece in pieces:
            self.starts.append(len(self.trace))
            looked = self._looked(multiplied) if piece.kind == "look" else None
            self.trace += [self._operation(k, looked) for k in piece.instructions]
            multiplied |= piece.kind == "product"
        self.starts.append(len(self.trace))
        self.begin = WARM_UP * len(self.trace)
        trace = self.trace * (WARM_UP + 1) + self.trace[:1]  # the next step's begin is this one's end
        self.issued = issue(trace, loop.warps, constants, loop.sharing)
        self.cycles = self.at(len(self.trace))

    def _looked(self, multiplied: bool) -> float:
        """Bytes of a warp's look, at the counter or at one word of each of a sum's parts."""
        return self.constants.sector * (self.loop.splits if multiplied else 1)

    def _operation(self, k: int, looked: float | None) -> Operation:
        """looked: in a wait, bytes of a look at a counter or at single words."""
        instruction = self.path.code[k]
        line = k // INSTRUCTIONS
        if instruction.kind != "load":
            return Operation(instruction, line=line)
        moved = float(LANES * instruction.width)
        if looked is not None and instruction.width <= 4:
            moved = looked
        from_memory = not instruction.strong and (k not in self.path.weights or self.loop.from_memory)
        return Operation(instruction, from_memory, moved, line)

    def at(self, place: int) -> float:
        return self.issued.at(self.begin + place) - self.issued.at(self.begin)

    def places(self, piece: int, wanted: Callable[[Instruction], bool]) -> list[int]:
        """Where in the step a piece has such instructions."""
        return [k for k in range(self.starts[piece], self.starts[piece + 1]) if wanted(self.trace[k].instruction)]

    def kinds(self, kind: str) -> list[int]:
        return [k for k, piece in enumerate(self.pieces) if piece.kind == kind]

    def piece(self, piece: int) -> float:
        """When a piece begins."""
        return self.at(self.starts[piece])

    def look(self, piece: int) -> float:
        """When a look is on its way; of several loads the first one, which may already see too little."""
        return self.at(self.places(piece, polled)[0])

    def parts(self, piece: int, look: int) -> float:
        """When the last store from the product to a look issues."""
        stores = [k for piece in range(piece, look) for k in self.places(piece, store)]
        return self.at(stores[-1]) if stores else self.piece(look)

    def rest(self, piece: int, origin: float) -> Rest:
        """The product and what follows, from a time on."""
        second = next((k for k in self.kinds("look") if k > piece), None)
        begin = self.starts[piece if second is None else second]
        told = next((k for k in range(begin, len(self.trace)) if self.trace[k].instruction.kind == "atomic"), None)
        return Rest(
            rows=(self.cycles if told is None else self.at(told)) - origin,
            end=self.cycles - origin,
            parts=None if second is None else self.parts(piece, second) - origin,
        )

    def reasons(self) -> dict[str, dict[str, float]]:
        """Cycles by phase, and by what warps wait for in it; mean over warps."""
        begins = [0, *self._phase_ends()]
        return {
            name: mean_by_reason(self.issued, self.begin + begin, self.begin + end)
            for name, begin, end in zip(PHASES, begins[:-1], begins[1:], strict=True)
        }

    def _phase_ends(self) -> list[int]:
        multiplied = (self.kinds("product") or [len(self.pieces) - 1])[0]
        end = self.starts[multiplied + 1]
        loads, products = self.places(multiplied, polled), self.places(multiplied, product)
        before = waited = loads[0] if loads else self.starts[multiplied]
        for look in self.kinds("look"):
            if look < multiplied:
                before, waited = min(before, self.places(look, polled)[0] + 1), self.starts[look + 1]
        summed = products[-1] + 1 if products else waited
        added = max([self.starts[look + 1] for look in self.kinds("look") if look > multiplied], default=end)
        stores = [k for k, operation in enumerate(self.trace) if store(operation.instruction)]
        stored = next((k + 1 for k in stores if k >= added), len(self.trace))
        if any(summed <= k < end for k in stores) and added == end:
            stored = next(k + 1 for k in stores if k >= summed)
            end = added = summed
        return [before, waited, summed, end, added, stored, len(self.trace)]
