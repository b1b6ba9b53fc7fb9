"""In-order issue: when the warps of the programs on one processor issue the instructions of a trace.

Four schedulers issue one instruction a cycle each. A warp's next one issues when the stall count of the one before is
over, the scoreboards that it waits for are free, and its pipe takes another one. All warps follow the same trace, so
branches cost no more than their stall counts, and predicates are taken as true.
"""

from __future__ import annotations

import dataclasses
import heapq
import re
from collections.abc import Sequence

from triton_lstm.perf.step.constants import Constants
from triton_lstm.perf.step.machine_code import NONE, Instruction

SCHEDULERS = 4
_MEMORY = (
    "load",
    "store",
    "local",
    "shared_load",
    "shared_store",
    "shuffle",
    "reduce",
    "constant",
    "register",
    "atomic",
)
_PIPE = dict.fromkeys(_MEMORY, "memory") | {
    "mma": "tensor",
    "special": "special",
    "convert": "special",
    "alu": "integer",
    "imad": "imad",
}
# What a warp waits for, by the kind of instruction that keeps it waiting
_REASON = {
    **dict.fromkeys(("load", "store", "local", "atomic"), "memory"),
    **dict.fromkeys(("shared_load", "shared_store"), "shared"),
    **dict.fromkeys(("shuffle", "reduce"), "shuffle"),
    **dict.fromkeys(("mma", "wgmma", "wgmma_wait"), "tensor"),
    **dict.fromkeys(("special", "convert"), "special"),
    "barrier": "barrier",
    "float": "float",
    "fence": "fence",
    "control": "branch",
}


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction in a trace, with where a load is served from.

    from_memory: a load of a line that nobody has touched. moved: bytes through the port to L2, for a warp. line: the
    instruction's in the cache of instructions.
    """

    instruction: Instruction
    from_memory: bool = False
    moved: float = 0.0
    line: int = 0


@dataclasses.dataclass(frozen=True)
class Issued:
    """times, reasons: by warp and place in the trace, when an instruction issued and what it waited for last."""

    times: list[list[float]]
    reasons: list[list[str]]

    def at(self, place: int) -> float:
        """When the last warp issued the instruction at a place."""
        return max(times[place] for times in self.times)


class _Warp:
    __slots__ = ("busy", "came", "place", "program", "ready", "scheduler", "tensor", "why", "why_busy")

    def __init__(self, program: int, scheduler: int) -> None:
        self.program, self.scheduler = program, scheduler
        self.place = 0
        self.ready, self.why = 0.0, "issue"
        self.busy, self.why_busy = [0.0] * 6, ["issue"] * 6  # scoreboards
        self.tensor = 0.0  # when its wgmma are done
        self.came = 0.0  # to the barrier


def issue(trace: Sequence[Operation], warps: int, constants: Constants, programs: int = 1) -> Issued:
    """Issues a trace in each warp of `programs` programs that share a processor and started together."""
    return _Processor(trace, warps, constants, programs).run()


class _Processor:
    def __init__(self, trace: Sequence[Operation], warps: int, constants: Constants, programs: int) -> None:
        self.trace, self.constants = trace, constants
        self.warps = [_Warp(program, k % SCHEDULERS) for program in range(programs) for k in range(warps)]
        self.per_program = warps
        self.free = [0.0] * SCHEDULERS
        self.pipes: list[dict[str, float]] = [{} for _ in range(SCHEDULERS)]
        self.lsu = self.port = self.tensor = 0.0  # of the processor: load and store unit, port to L2, wgmma
        self.lines: list[dict[int, float]] = [{} for _ in range(SCHEDULERS)]  # when one was there, the oldest first
        self.stored = [0.0] * programs  # when shared memory has a program's stores
        self.arrived: list[list[int]] = [[] for _ in range(programs)]

    def run(self) -> Issued:
        count = len(self.trace)
        times = [[0.0] * count for _ in self.warps]
        reasons = [["issue"] * count for _ in self.warps]
        queue = [(0.0, k) for k in range(len(self.warps) if count else 0)]
        while queue:
            before, k = heapq.heappop(queue)
            warp = self.warps[k]
            operation = self.trace[warp.place]
            time, why = self._earliest(warp, operation.instruction)
            if time > before:  # others were faster; all times only grow
                heapq.heappush(queue, (time, k))
                continue
            times[k][warp.place], reasons[k][warp.place] = time, why
            warp.place += 1
            for other in self._issue(k, warp, operation, time):
                if self.warps[other].place < count:
                    heapq.heappush(queue, (self.warps[other].ready, other))
        if any(self.arrived):
            raise ValueError("a barrier that not all warps come to")
        return Issued(times, reasons)

    def _earliest(self, warp: _Warp, instruction: Instruction) -> tuple[float, str]:
        time, why = warp.ready, warp.why
        for board in instruction.waits:
            if warp.busy[board] > time:
                time, why = warp.busy[board], warp.why_busy[board]
        kind = instruction.kind
        pipe = _PIPE.get(kind)
        if pipe and self.pipes[warp.scheduler].get(pipe, 0.0) > time:
            time, why = self.pipes[warp.scheduler][pipe], "shared" if pipe == "memory" else pipe
        if self.free[warp.scheduler] > time:
            time, why = self.free[warp.scheduler], "issue"
        if kind == "wgmma_wait" and warp.tensor > time:
            time, why = warp.tensor, "tensor"
        return time, why

    def _issue(self, k: int, warp: _Warp, operation: Operation, time: float) -> list[int]:
        """Lets a warp's instruction issue; returns the warps that may go on."""
        instruction, c = operation.instruction, self.constants
        kind = instruction.kind
        self.free[warp.scheduler] = time + 1
        warp.ready, warp.why = time + max(1, instruction.stall), _REASON.get(kind, "integer")
        pipes = self.pipes[warp.scheduler]
        if kind in _MEMORY:
            pipes["memory"] = time + c.issue_memory
        write, read = time, time + c.operands_read
        if kind == "load":
            begin = self._enter(time, instruction.wavefronts)
            read = begin + c.operands_read
            if operation.from_memory:  # few bytes, which overtake nothing
                write = begin + c.memory
            else:
                takes = operation.moved / c.port
                self.port = write = max(self.port, begin + c.l2 - takes) + takes
        elif kind in ("store", "shared_store"):
            done = self._enter(time, instruction.wavefronts) + instruction.wavefronts
            if kind == "shared_store":
                self.stored[warp.program] = done
            write = read = done + c.operands_read
        elif kind == "shared_load":
            begin = self._enter(time, instruction.wavefronts)
            latency = c.matrix_load if instruction.name.startswith("LDSM") else c.shared_load
            write, read = begin + instruction.wavefronts + latency, begin + c.operands_read
        elif kind == "local":
            begin = self._enter(time, instruction.wavefronts)
            write, read = begin + c.local, begin + c.operands_read
        elif kind == "shuffle":
            begin = self._enter(time, 1)
            write, read = begin + c.shuffle, begin + c.operands_read
        elif kind in ("reduce", "constant", "register", "atomic"):
            write = time + {"reduce": c.reduce, "constant": c.constant, "register": c.register}.get(kind, c.atomic)
        elif kind == "special":
            pipes["special"], write = time + c.issue_special, time + c.special
        elif kind == "convert":
            pipes["special"], write = time + c.issue_convert, time + c.convert
        elif kind == "alu":
            pipes["integer"] = time + c.issue_integer
        elif kind == "imad":
            pipes["imad"] = time + c.issue_imad
        elif kind == "mma":
            pipes["tensor"] = time + (c.issue_mma_tf32 if "1688" in instruction.name else c.issue_mma)
        elif kind == "wgmma":
            write = read = warp.tensor = self._wgmma(k, instruction, time)
        elif kind == "fence":
            warp.ready = time + c.fence
        for board, until in ((instruction.write, write), (instruction.read, read)):
            if board != NONE and until > warp.busy[board]:
                warp.busy[board], warp.why_busy[board] = until, _REASON.get(kind, "other")
        if c.fetch:
            self._fetch(warp, time)
        if kind == "barrier" and "ARV" not in instruction.name:
            warp.came = time
            return self._arrive(k, warp)
        return [k]

    def _fetch(self, warp: _Warp, time: float) -> None:
        """Delays a warp until its scheduler has the line of its next instruction."""
        if warp.place == len(self.trace):
            return
        line, lines = self.trace[warp.place].line, self.lines[warp.scheduler]
        there = lines.pop(line, time + self.constants.fetch)
        lines[line] = there
        if len(lines) > self.constants.lines:
            del lines[next(iter(lines))]
        if there > warp.ready:
            warp.ready, warp.why = there, "fetch"

    def _enter(self, time: float, wavefronts: int) -> float:
        """When the load and store unit takes an instruction."""
        begin = max(self.lsu, time)
        self.lsu = begin + wavefronts
        return begin

    def _wgmma(self, k: int, instruction: Instruction, time: float) -> float:
        """When the product of a warp group is done; its first warp occupies the tensor cores."""
        shape = re.search(r"64x(\d+)x", instruction.name)
        columns = int(shape[1]) if shape else 8
        takes = max(self.constants.wgmma_a + columns * 32 / 128, columns / 2)
        if k % 4 == 0:
            self.tensor = max(self.tensor, time) + takes
        return max(self.tensor, time + takes) + self.constants.wgmma_done

    def _arrive(self, k: int, warp: _Warp) -> list[int]:
        waiting = self.arrived[warp.program]
        waiting.append(k)
        if len(waiting) < self.per_program:
            return []
        last = max(self.warps[other].came for other in waiting)
        go = max(last, self.stored[warp.program]) + self.constants.barrier
        for other in waiting:
            if go > self.warps[other].ready:
                self.warps[other].ready, self.warps[other].why = go, "barrier"
        released, self.arrived[warp.program] = waiting, []
        return released


def mean_by_reason(issued: Issued, begin: int, end: int) -> dict[str, float]:
    """Cycles from the issue before `begin` to that of `end` - 1, by what a warp waited for; mean over warps."""
    found: dict[str, float] = {}
    for times, reasons in zip(issued.times, issued.reasons, strict=True):
        for place in range(max(begin, 1), end):
            taken = (times[place] - times[place - 1]) / len(issued.times)
            found[reasons[place]] = found.get(reasons[place], 0.0) + taken
    return found
