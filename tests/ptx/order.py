"""What happens before what: vector clocks for the threads of a launch (PTX's memory consistency model).

Time is a count of events. All threads of a program share what was known at its last barrier; what a single thread has
acquired since then is its own, until the next barrier of its warp or program hands it out.
An *agent* is whoever made an access: a thread, a warp (several of its threads at once), or a program (several warps).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from .faults import Fault

Array = np.ndarray
NOBODY = -1


@dataclasses.dataclass
class Knowledge:
    """Accesses that happened before: of each program up to a time, and of single agents up to a later one."""

    programs: Array
    agents: dict[int, int] = dataclasses.field(default_factory=dict)

    def copy(self) -> Knowledge:
        return Knowledge(self.programs.copy(), dict(self.agents))

    def add(self, other: Knowledge) -> None:
        np.maximum(self.programs, other.programs, out=self.programs)
        for agent, time in other.agents.items():
            self.agents[agent] = max(self.agents.get(agent, -1), time)


class Release(NamedTuple):
    """What a store or atomic hands to whoever acquires it. wide: beyond its program (scopes gpu and sys)."""

    program: int
    wide: bool
    knowledge: Knowledge


def merged(releases: list[Release]) -> list[Release]:
    """The same with one release of each program and scope: who acquires one of a chain acquires all."""
    together: dict[tuple[int, bool], Release] = {}
    for release in releases:
        key = release.program, release.wide
        if key in together and together[key] is not release:
            knowledge = together[key].knowledge.copy()
            knowledge.add(release.knowledge)
            release = release._replace(knowledge=knowledge)
        together[key] = release
    return [*together.values()]


class Order:
    """Clocks of `programs` with `threads` each. At time 0 nothing happens, and it was before everything."""

    def __init__(self, programs: int, threads: int) -> None:
        self.threads, self.warps = threads, threads // 32
        self.agents = threads + self.warps + 1  # of a program
        self.now = 1
        self.program = [Knowledge(np.zeros(programs, np.int64)) for _ in range(programs)]
        self.warp_synced = np.full((programs, self.warps), -1, np.int64)
        self.acquired: dict[tuple[int, int], Knowledge] = {}  # by program and thread, since the last barrier
        self.fenced: dict[tuple[int, int], list[Release]] = {}  # by a fence, for the thread's later stores
        self.read: dict[tuple[int, int], list[Release]] = {}  # by relaxed loads, for the thread's later fence
        self.fenced_sc: list[Release] = []  # by all fence.sc so far, for later ones

    # Agents
    def agent(self, program: int, threads: Array) -> Array:
        return program * self.agents + threads

    def several(self, program: int, warps: Array) -> Array:
        """The agents that stand for several threads of warps; -1 in `warps`: of several warps."""
        return program * self.agents + self.threads + np.where(warps < 0, self.warps, warps)

    def warp_of(self, agents: Array) -> Array:
        """The warp of an agent of any program; -1 for several warps."""
        local = agents % self.agents
        warp = np.where(local < self.threads, local // 32, local - self.threads)
        return np.where(warp == self.warps, -1, warp)

    # Barriers
    def barrier(self, program: int) -> None:
        """All threads of the program have arrived."""
        known = self.program[program]
        for (p, _), more in list(self.acquired.items()):
            if p == program:
                known.add(more)
        self.acquired = {key: more for key, more in self.acquired.items() if key[0] != program}
        known.programs[program] = self.now
        self.warp_synced[program] = self.now
        self.now += 1

    def warp_barrier(self, program: int, warps: Array) -> None:
        self.warp_synced[program, warps] = self.now
        self.now += 1
        for warp in warps if self.acquired else ():
            lanes = [(program, 32 * int(warp) + k) for k in range(32)]
            shared = [self.acquired[lane] for lane in lanes if lane in self.acquired]
            if shared:
                together = shared[0].copy()
                for more in shared[1:]:
                    together.add(more)
                self.acquired |= {lane: together.copy() for lane in lanes}

    # Release and acquire
    def known_by(self, program: int, thread: int) -> Knowledge:
        """What a thread releases: all it knows, and what it did."""
        known = self.program[program].copy()
        if more := self.acquired.get((program, thread)):
            known.add(more)
        base = program * self.agents
        known.agents[base + thread] = self.now
        known.agents[base + self.threads + thread // 32] = int(self.warp_synced[program, thread // 32])
        return known

    def release(self, program: int, thread: int, scope: str) -> Release:
        return Release(program, _wide(scope), self.known_by(program, thread))

    def acquire(self, program: int, thread: int, scope: str, releases: list[Release]) -> None:
        for release in releases:
            if release.program == program or (release.wide and _wide(scope)):
                own = self.acquired.setdefault((program, thread), Knowledge(self.program[program].programs.copy()))
                own.add(release.knowledge)

    def fence(self, program: int, threads: Array, scope: str, sc: bool) -> None:
        """Orders what a thread did before it against its later stores, and what it read against its later loads.

        sc: fence.sc, each of which also synchronizes with all later ones.
        """
        for thread in map(int, threads):
            key = program, thread
            self.acquire(program, thread, scope, [*self.read.pop(key, []), *(self.fenced_sc if sc else ())])
            self.fenced[key] = [self.release(program, thread, scope)]
            if sc:
                self.fenced_sc = merged([*self.fenced_sc, *self.fenced[key]])
        self.now += 1

    # Questions
    def before(self, program: int, threads: Array, agents: Array, times: Array) -> Array:
        """Whether accesses by `agents` at `times` happened before what `threads` of a program do now.

        All of one shape. NOBODY's are at time -1.
        """
        known = self.program[program]
        ok = times <= known.programs[agents // self.agents]
        if np.count_nonzero(ok) == ok.size:
            return ok
        ok |= agents == self.agent(program, threads)
        warp = threads // 32
        mine = (self.warp_of(agents) == warp) & (agents // self.agents == program)
        ok |= mine & (times <= self.warp_synced[program, warp])
        if np.count_nonzero(ok) == ok.size or not (known.agents or self.acquired):
            return ok
        for k in np.flatnonzero(~ok.ravel()):
            agent, time = int(agents.ravel()[k]), int(times.ravel()[k])
            more = self.acquired.get((program, int(threads.ravel()[k])))
            ok.ravel()[k] = self._told(known, agent, time) or (more is not None and self._told(more, agent, time))
        return ok

    def _told(self, known: Knowledge, agent: int, time: int) -> bool:
        if time <= known.programs[agent // self.agents]:
            return True
        warp = int(self.warp_of(np.array(agent)))
        whole = agent // self.agents * self.agents + self.threads + warp
        return time <= known.agents.get(agent, -1) or (warp >= 0 and time <= known.agents.get(whole, -1))


def _wide(scope: str) -> bool:
    if scope not in ("cta", "cluster", "gpu", "sys"):
        raise Fault(f"an unknown scope, {scope}")
    return scope in ("gpu", "sys")
