"""All programs of a batch tile, waiting for each other's rows, step after step.

A step's durations are the issue model's; what is simulated here is when a store is seen and how often a program looks.
"""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np

from triton_lstm.perf.step.constants import Constants

STEPS, SETTLED = 60, 20  # simulated, and of them those before programs have found their rhythm


@dataclasses.dataclass(frozen=True)
class Wait:
    """A loop of looks. first: its first look, from the step's begin. period: from look to look."""

    first: float
    period: float


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One run of the product. loads: of the chunks of rows, from its begin. rest: from its begin to its stores of
    `rows`, the step's `end` and, with sums over several programs, the stores of `parts`."""

    loads: tuple[float, ...]
    rows: float
    end: float
    parts: float | None = None


@dataclasses.dataclass(frozen=True)
class Failure:
    """What a failed attempt costs. length: from its begin until the next attempt, a look for what is missing included.
    again: that attempt."""

    length: float
    again: Attempt


@dataclasses.dataclass(frozen=True)
class Durations:
    """Of one program's step. begin: of the first attempt, from the step's begin if there is no wait.

    wait: before the product. attempts: the first one, from the last look's issue or `begin`, after 0, 1, .. looks in
    vain. parts: the wait for other programs' parts of the sum; its first look is counted from the stores of parts.
    """

    begin: float
    attempts: tuple[Attempt, ...]
    wait: Wait | None = None
    parts: Wait | None = None
    failure: Failure | None = None


@dataclasses.dataclass(frozen=True)
class Waited:
    """cycles, looks: mean of a step. looks of waits, or attempts where there is no wait."""

    cycles: float
    looks: float


def wait_for_each_other(
    durations: Durations, programs: int, constants: Constants, *, gates: int = 1, splits: int = 1
) -> Waited:
    """Lets `programs` programs exchange rows.

    gates: how many times a row holds every program's units: 4 where it has the gradients of all gates.
    splits: how many programs, neighbours, add up the parts of one sum; each reads another split of the rows.
    """
    return _World(durations, programs, constants, gates, splits).run()


def holders(programs: int, gates: int, chunks: int, splits: int = 1) -> np.ndarray:
    """Which programs write something of which chunk of what a program reads: [chunk, reader, writer]."""
    written = (np.arange(gates)[:, None] * programs + np.arange(programs)) * (chunks * splits) // (gates * programs)
    read = np.arange(chunks)[:, None] + np.arange(programs) % splits * chunks
    return (written == read[:, :, None, None]).any(2)


class _World:
    def __init__(self, durations: Durations, programs: int, constants: Constants, gates: int, splits: int) -> None:
        self.d, self.n, self.c = durations, programs, constants
        self.random = random.Random(0)
        far = [[self.random.uniform(0, constants.seen_spread) for _ in range(programs)] for _ in range(programs)]
        self.seen = constants.seen + np.array(far)  # [reader, writer]
        self.arrives = constants.l2 / 2  # from a load's issue until it is at L2
        chunks = max(len(durations.attempts[0].loads), 1)
        self.holds = holders(programs, gates, chunks, splits)
        self.group = np.arange(programs) // splits
        self.looks = 0.0

    def run(self) -> Waited:
        begin, stored = np.zeros(self.n), np.full(self.n, -math.inf)
        ends = []
        for step in range(STEPS):
            if step == SETTLED:
                self.looks = 0.0
            stored, begin = self._step(begin, stored)
            ends.append(stored.mean())
        steps = STEPS - SETTLED
        return Waited((ends[-1] - ends[SETTLED - 1]) / steps, self.looks / steps / self.n)

    def _step(self, begin: np.ndarray, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """From when programs begin, and when they stored the rows before, to when they store and end."""
        d = self.d
        there = stored[None, :] + self.seen  # when a reader sees a writer's rows
        noise = np.array([self.random.gauss(0, self.c.jitter) for _ in range(self.n)])
        at = begin + noise + (d.wait.first if d.wait else d.begin)
        vain = np.zeros(self.n, int)
        if d.wait:
            vain = self._in_vain(at, there.max(1), d.wait.period)
            self.looks += vain.sum() + self.n
            at = at + vain * d.wait.period
        else:
            self.looks += self.n
        needed = np.array([np.where(holds, there, -math.inf).max(1) for holds in self.holds])  # [chunk, reader]
        done = [
            self._attempts(at[p], d.attempts[min(vain[p], len(d.attempts) - 1)], needed[:, p]) for p in range(self.n)
        ]
        rows = np.array([time + attempt.rows for time, attempt in done])
        end = np.array([time + attempt.end for time, attempt in done])
        if d.parts:
            parts = np.array([time + (attempt.parts or 0.0) for time, attempt in done])
            of_group = np.where(self.group[:, None] == self.group[None, :], parts[None, :] + self.seen, -math.inf)
            vain = self._in_vain(parts + d.parts.first, of_group.max(1), d.parts.period)
            self.looks += vain.sum() + self.n
            rows, end = rows + vain * d.parts.period, end + vain * d.parts.period
        return rows, end

    def _in_vain(self, first: np.ndarray, there: np.ndarray, period: float) -> np.ndarray:
        """How many looks see too little, the first of which is at `first`."""
        late = np.where(np.isfinite(there), there - first - self.arrives, 0.0)
        return np.ceil(np.maximum(late, 0.0) / period).astype(int)

    def _attempts(self, time: float, attempt: Attempt, needed: np.ndarray) -> tuple[float, Attempt]:
        """The attempt that succeeds and when it begins, where the first one begins at `time`."""
        failure = self.d.failure
        while failure and not self._see(time, attempt.loads, needed):
            time, attempt = time + failure.length, failure.again
            self.looks += 1
        return time, attempt

    def _see(self, time: float, loads: tuple[float, ...], needed: np.ndarray) -> bool:
        if not loads:
            return True
        chunks = np.arange(len(needed)) * len(loads) // len(needed)
        return all(time + loads[k] + self.arrives >= there for k, there in zip(chunks, needed, strict=True))
