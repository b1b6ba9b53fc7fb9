"""In which order programs run and which stores are seen late: decided by a seed, replayed, and shrunk after a failure.

Without a decision a program runs until it has to wait, and a store is seen at once. A decision belongs to a program's
n-th access to global memory, so that it means the same when other decisions are left out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray
SWITCHING = (0.0, 0.02, 0.1, 0.4)  # shares of accesses after which another program, or warp, runs
LATE = (0.2, 0.6, 0.95)  # shares of stores that are seen late, under weak memory
LENGTHS = (10, 100, 1000, 10_000)  # the longest delays, in accesses of all programs
STRAGGLERS = (1 << 30, 8, 256, 4096)  # of so many neighbouring elements one is seen last of all
FOREVER = 1 << 40
MASK = (1 << 64) - 1
GRAINS = ("element and thread", "element", "thread", "program")  # what is delayed alike


class Decision(NamedTuple):
    """After `program`'s access number `access`: "switch" to another program or warp; or a store is seen "late"."""

    kind: str
    program: int
    access: int

    def __str__(self) -> str:
        return f"{self.kind} {self.program}@{self.access}"


@dataclasses.dataclass
class Schedule:
    """Decisions for one launch.

    seed: what decides. weak: whether stores may be seen late. only: the decisions that are allowed, None for all.
    made: those that were made. straggler: (n, k): element k of every n is seen last of all, where it is late.
    late_looks: how often a program that waits looks again before half of its threads see all that is late, then all do.
    """

    seed: int = 0
    weak: bool = False
    only: frozenset[Decision] | None = None
    made: set[Decision] = dataclasses.field(default_factory=set)
    straggler: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.switching, self.lateness = (s[self._draw(k, 0, 0) % len(s)] for k, s in enumerate((SWITCHING, LATE)))
        self.grain = GRAINS[self._draw(2, 0, 0) % len(GRAINS)]
        length = LENGTHS[self._draw(3, 0, 0) % len(LENGTHS)]
        self.delays = np.geomspace(1, length, 256).astype(np.int64)
        self.late_looks = 2
        if not self.straggler[0]:
            self.late_looks = self._draw(10, 0, 0) % 2
            among = STRAGGLERS[self._draw(8, 0, 0) % len(STRAGGLERS)]
            self.straggler = among, self._draw(9, 0, 0) % among

    def __str__(self) -> str:
        which = "" if self.only is None else f": {', '.join(map(str, sorted(self.only))) or 'no decision'}"
        return f"seed {self.seed}, {'weak' if self.weak else 'sequentially consistent'} memory{which}"

    @staticmethod
    def parse(text: str) -> Schedule:
        """The schedule of its text, as a fault's report gives it.

        Raises ValueError for any other text.
        """
        found = re.fullmatch(r"seed (\d+), (weak|sequentially consistent) memory(?:: (.*))?", text.strip())
        if found is None:
            raise ValueError(f'a schedule reads like "seed 7, weak memory: late 0@3, switch 1@9", not {text!r}')
        only = None
        if found[3] is not None:
            parts = re.findall(r"(late|switch) (\d+)@(\d+)", found[3])
            only = frozenset(Decision(kind, int(program), int(access)) for kind, program, access in parts)
        return Schedule(int(found[1]), found[2] == "weak", only)

    def switch(self, program: int, access: int) -> int | None:
        """A number that says who runs next, None for the usual one."""
        if not self._decides("switch", program, access, self.switching):
            return None
        return self._draw(5, program, access)

    def pick(self, program: int, access: int) -> int:
        """A number that says which of the programs that wait for each other looks again."""
        return self._draw(7, program, access)

    def half(self, program: int, access: int, threads: int) -> Array:
        """Which half of a program's threads sees all that is late before the others do."""
        return np.random.default_rng(self._draw(11, program, access)).random(threads) < 0.5

    def late(self, program: int, access: int) -> bool:
        """Whether a store is seen late."""
        return self.weak and self._decides("late", program, access, self.lateness)

    def delay(self, elements: Array, agents: Array, programs: Array, times: Array) -> Array:
        """How much later than others' agents stored, at `times`, those elements are seen by `agents`."""
        which = times.astype(np.uint64)
        if self.grain != "thread":
            which = which * np.uint64(0x100000001B3) + elements.astype(np.uint64)
        if self.grain != "element":
            seen_by = programs if self.grain == "program" else agents
            which = which * np.uint64(0x9E3779B97F4A7C15) + seen_by.astype(np.uint64)
        delays = self.delays[(_mix(which + np.uint64(self.seed)) & np.uint64(255)).astype(np.int64)]
        among, k = self.straggler
        return np.where(elements % among == k, FOREVER, delays)

    def _decides(self, kind: str, program: int, access: int, share: float) -> bool:
        if self._draw(4 if kind == "switch" else 6, program, access) % 1000 >= 1000 * share:
            return False
        decision = Decision(kind, program, access)
        if self.only is not None and decision not in self.only:
            return False
        self.made.add(decision)
        return True

    def _draw(self, purpose: int, program: int, access: int) -> int:
        state = self.seed
        for part in (purpose, program, access):
            x = (state * 0x100000001B3 + part + 1) & MASK
            x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
            x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
            state = x ^ x >> 31
        return state


def _mix(x: Array) -> Array:
    """SplitMix64's finalizer."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool], tries: int = 60) -> Schedule:
    """The schedule with fewer decisions that still fails (Zeller's ddmin), after `tries` runs at most.

    fails: runs a launch with a schedule, and says whether it went wrong as before.
    """
    kept = sorted(schedule.made)
    parts, left = 2, tries
    smallest = dataclasses.replace(schedule, only=frozenset(kept), made=set())
    none = dataclasses.replace(schedule, only=frozenset(), made=set())
    if fails(none):
        return none
    while len(kept) > 1 and left > 0:
        size = -(-len(kept) // parts)
        for begin in range(0, len(kept), size):
            fewer = kept[:begin] + kept[begin + size :]
            tried = dataclasses.replace(schedule, only=frozenset(fewer), made=set())
            left -= 1
            if fails(tried):
                kept = [decision for decision in fewer if decision in tried.made]
                smallest = dataclasses.replace(schedule, only=frozenset(kept), made=set())
                parts = max(2, parts - 1)
                break
            if left <= 0:
                break
        else:
            if parts >= len(kept):
                break
            parts = min(len(kept), 2 * parts)
    return smallest
