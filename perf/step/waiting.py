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
class Rest:
    """What follows a look. rows: until other programs are told of the step's rows. end: until its end. parts: until the
    stores of `parts`, with sums over several programs."""

    rows: float
    end: float
    parts: float | None = None


@dataclasses.dataclass(frozen=True)
class Durations:
    """Of one program's step.

    wait: for rows. rests: after the last look's issue, with 0, 1, .. looks in vain. parts: the wait for other programs'
    parts of the sum; its first look is counted from the stores of parts.
    """

    wait: Wait
    rests: tuple[Rest, ...]
    parts: Wait | None = None


@dataclasses.dataclass(frozen=True)
class Waited:
    """Mean of a step."""

    cycles: float
    looks: float


def wait_for_each_other(durations: Durations, programs: int, constants: Constants, *, splits: int = 1) -> Waited:
    """Lets `programs` programs exchange rows. splits: how many of them, neighbours, add up the parts of one sum."""
    return _World(durations, programs, constants, splits).run()


class _World:
    def __init__(self, durations: Durations, programs: int, constants: Constants, splits: int) -> None:
        self.d, self.n, self.c = durations, programs, constants
        self.random = random.Random(0)
        far = [[self.random.uniform(0, constants.seen_spread) for _ in range(programs)] for _ in range(programs)]
        self.seen = constants.seen + np.array(far)  # [reader, writer]
        self.arrives = constants.l2 / 2  # from a load's issue until it is at L2
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
        at = begin + noise + d.wait.first
        vain = self._in_vain(at, there.max(1), d.wait.period)
        self.looks += vain.sum() + self.n
        at = at + vain * d.wait.period
        rests = [d.rests[min(n, len(d.rests) - 1)] for n in vain]
        rows = at + np.array([rest.rows for rest in rests])
        end = at + np.array([rest.end for rest in rests])
        if d.parts:
            parts = at + np.array([rest.parts or 0.0 for rest in rests])
            of_group = np.where(self.group[:, None] == self.group[None, :], parts[None, :] + self.seen, -math.inf)
            vain = self._in_vain(parts + d.parts.first, of_group.max(1), d.parts.period)
            self.looks += vain.sum() + self.n
            rows, end = rows + vain * d.parts.period, end + vain * d.parts.period
        return rows, end

    def _in_vain(self, first: np.ndarray, there: np.ndarray, period: float) -> np.ndarray:
        """How many looks see too little, the first of which is at `first`."""
        late = np.where(np.isfinite(there), there - first - self.arrives, 0.0)
        return np.ceil(np.maximum(late, 0.0) / period).astype(int)
