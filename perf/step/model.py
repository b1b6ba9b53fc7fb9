"""A step of a compiled time loop, in cycles: of one program with every row there, and of programs that wait."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from triton_lstm.perf.step.constants import H100, Constants
from triton_lstm.perf.step.machine_code import Instruction, parse
from triton_lstm.perf.step.path import Path, Piece, find_path
from triton_lstm.perf.step.timeline import Loop, Timeline
from triton_lstm.perf.step.waiting import Durations, Wait, wait_for_each_other

VAIN = 2  # looks in vain after which a step's durations only grow by the loop's period
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")


class NoModelError(ValueError):
    """There is no model of a kernel; the text says why."""


@dataclasses.dataclass(frozen=True)
class Step:
    """The model's answer, of one batch tile. cycles: with every row there. waiting, looks: of programs that wait.

    phases: `cycles` by phase and by what warps wait for. instructions, barriers, local: of a step in time;
    local ones access spilled registers. rounds: tiles in turn.
    """

    cycles: float
    waiting: float
    looks: float
    phases: dict[str, dict[str, float]]
    instructions: int
    barriers: int
    local: int
    rounds: int
    constants: Constants

    def us(self, cycles: float) -> float:
        """Of a step of the whole batch."""
        return self.rounds * cycles / self.constants.mhz

    def __str__(self) -> str:
        looks = f", {self.looks:.2f} looks a step" if self.looks else ""
        spills = f", {self.local} accesses to spilled registers" if self.local else ""
        there = f", {self.us(self.cycles):.2f} with every row there" if self.looks else ""
        return f"{self.us(self.waiting):.2f} us a step{there}{looks}, {self.barriers} barriers{spills}"


def model_step(code: str | list[Instruction], loop: Loop, constants: Constants = H100) -> Step:
    """The model of a time loop. code: the output of `nvdisasm -hex -c`, or its instructions.

    Raises NoModelError where there is none, NoStepError where no time step was found.
    """
    instructions = parse(code) if isinstance(code, str) else code
    if any(instruction.kind == "tcgen05" for instruction in instructions):
        raise NoModelError("there is no model of Blackwell's asynchronous tensor cores")
    return _Model(find_path(instructions, loop.chunks), loop, constants).step()


def why_no_model(arch: str) -> str | None:
    """The reason why there is no model of an architecture, such as "gfx942", or None."""
    return None if arch in ARCHITECTURES else f"there is no model of {arch}"


class _Model:
    def __init__(self, path: Path, loop: Loop, constants: Constants) -> None:
        self.path, self.loop, self.constants = path, loop, constants
        self.plain = self._timeline(path.pieces)

    def _timeline(self, pieces: Sequence[Piece]) -> Timeline:
        return Timeline(self.path, pieces, self.loop, self.constants)

    def step(self) -> Step:
        kinds = [operation.instruction.kind for operation in self.plain.trace]
        waiting, looks = self.plain.cycles, 0.0
        durations = self.durations()
        if self.loop.programs > 1 and durations:
            waited = wait_for_each_other(durations, self.loop.programs, self.constants, splits=self.loop.splits)
            waiting, looks = max(waited.cycles, waiting), waited.looks
        return Step(
            cycles=self.plain.cycles,
            waiting=waiting,
            looks=looks,
            phases=self.plain.reasons(),
            instructions=len(kinds),
            barriers=kinds.count("barrier"),
            local=kinds.count("local"),
            rounds=self.loop.rounds,
            constants=self.constants,
        )

    def durations(self) -> Durations | None:
        """None where nothing is waited for."""
        line, pieces = self.plain, self.path.pieces
        multiplied = (line.kinds("product") or [len(pieces) - 1])[0]
        first = [k for k in line.kinds("look") if k < multiplied]
        second = [k for k in line.kinds("look") if k > multiplied]
        if not first:
            return None
        parts = None
        if second:
            twice = self._timeline(_repeat(pieces, second[0], 2))
            period = twice.look(second[0] + 1) - twice.look(second[0])
            parts = Wait(line.look(second[0]) - line.parts(multiplied, second[0]), period)
        lines = [line] + [self._timeline(_repeat(pieces, first[0], n + 1)) for n in range(1, VAIN + 1)]
        looks = [each.look(first[0] + n) for n, each in enumerate(lines)]
        rests = tuple(each.rest(multiplied + n, looks[n]) for n, each in enumerate(lines))
        return Durations(Wait(looks[0], (looks[-1] - looks[0]) / VAIN), rests, parts)


def _repeat(pieces: Sequence[Piece], k: int, times: int) -> list[Piece]:
    return [*pieces[:k], *[pieces[k]] * times, *pieces[k + 1 :]]
