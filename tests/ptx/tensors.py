"""Tensors in global memory: who stored and loaded each element, and older values that may still be seen."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .order import NOBODY, Order, Release

Array = np.ndarray
HISTORY = 3  # older stores of an element that may still be seen


class Access(NamedTuple):
    """What an instruction does with memory. ordering: weak, relaxed, acquire, release or acq_rel.

    cached: perhaps in a cache that nobody keeps right. number: of the instruction. place: in words.
    """

    kind: str  # load, store or atomic
    ordering: str
    scope: str
    cached: bool
    number: int
    place: str

    @property
    def strong(self) -> bool:
        return self.ordering != "weak"

    @property
    def words(self) -> str:
        """relaxed load, or weak store; with the scope if other programs are outside of it."""
        narrow = f".{self.scope}" if self.strong and self.scope not in ("gpu", "sys") else ""
        return f"{self.ordering}{narrow} {self.kind}"

    def strong_with(self, other: Access, same_program: bool) -> bool:
        """Whether both are strong and see each other's scope ("morally strong"): then they are no race."""
        wide = all(a.scope in ("gpu", "sys") for a in (self, other))
        return self.strong and other.strong and (wide or same_program)


class Allowed(NamedTuple):
    """Pairs of accesses to a tensor that may race, by their words, and why that is right."""

    tensor: str
    pair: frozenset[str]
    reason: str


class Readers(NamedTuple):
    """The latest load of each element by one program. Time 0: none; what was never looked at takes no memory."""

    agent: Array
    time: Array
    number: Array


class Tensor:
    """A tensor that a kernel was given. base: its address there. written: which elements had a value at the launch."""

    def __init__(self, name: str, values: Array, written: Array, base: int, read_only: bool) -> None:
        self.name, self.base, self.read_only = name, base, read_only
        self.values, self.size, self.nbytes = values, values.itemsize, values.nbytes
        self.given = written
        self.all_given = bool(written.all())
        n = values.size
        self.agent, self.time = np.full(n, NOBODY, np.int32), np.full(n, -1, np.int64)  # of the latest store
        self.number = np.zeros(n, np.int32)
        self.late = np.zeros(n, bool)
        self.readers: dict[int, Readers] = {}
        self.releases: dict[int, dict[int, list[Release]]] = {}  # by element and time of the store
        self.older: list[tuple[Array, Array, Array, Array]] = []  # values, agent, time and late, latest first
        self.version = 0  # stores so far

    def push(self, i: Array) -> None:
        """Remembers the present values of elements that are about to be stored."""
        if not self.older:
            self.older = [
                tuple(x.copy() for x in (self.values, self.agent, self.time, self.late)) for _ in range(HISTORY)
            ]
        for k in range(HISTORY - 1, 0, -1):
            for to, source in zip(self.older[k], self.older[k - 1], strict=True):
                to[i] = source[i]
        for to, source in zip(self.older[0], (self.values, self.agent, self.time, self.late), strict=True):
            to[i] = source[i]

    def readers_of(self, program: int) -> Readers:
        if program not in self.readers:
            n = self.values.size
            self.readers[program] = Readers(np.zeros(n, np.int32), np.zeros(n, np.int64), np.zeros(n, np.int32))
        return self.readers[program]


def merge_readers(order: Order, program: int, who: Array, i: Array, agent: Array, time: Array) -> None:
    """Notes that threads read cells: the only one since the last barrier, or several of a warp or program."""
    mine = order.agent(program, who)
    recent = time[i] > order.program[program].programs[program]
    if np.count_nonzero(recent):
        recent &= (order.warp_of(agent[i]) != who // 32) | (time[i] > order.warp_synced[program, who // 32])
        before = np.where(recent, agent[i], mine)
        together = order.several(program, np.where(order.warp_of(before) == who // 32, who // 32, -1))
        mine = np.where(before == mine, mine, together)
    agent[i] = mine
    time[i] = order.now
    differ = agent[i] != mine  # several threads of this very instruction
    if np.count_nonzero(differ):
        cells, warps = i[differ], who[differ] // 32
        alone = order.warp_of(agent[cells]) == warps
        agent[cells[alone]] = order.several(program, warps[alone])
        agent[cells[~alone]] = order.several(program, np.array(-1))
