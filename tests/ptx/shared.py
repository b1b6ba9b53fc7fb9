"""Shared memory of one program: bounds, unwritten bytes, and races between its threads and with the tensor cores.

The tensor cores read it asynchronously (wgmma): what threads stored must be fenced for that proxy before, and must not
be stored anew before the product was waited for.
"""

from __future__ import annotations

import numpy as np

from .faults import Fault
from .memory import Memory
from .numbers import UNSIGNED
from .order import NOBODY
from .tensors import Access, merge_readers

Array = np.ndarray
BASE = 1 << 10  # the address of its first byte, so that no address is 0


class Shared:
    """nbytes: what the kernel asked for. cell: bytes of the smallest access in the kernel, which are tracked as one."""

    def __init__(self, memory: Memory, program: int, nbytes: int, cell: int, warps: int) -> None:
        self.memory, self.order, self.program = memory, memory.order, program
        self.nbytes, self.cell = nbytes, cell
        self.bytes = np.full(-(-nbytes // 16) * 16, 0xA5, np.uint8)
        n = self.bytes.size // cell
        self.agent, self.time = np.full(n, NOBODY, np.int32), np.full(n, -1, np.int64)  # of the latest store
        self.number = np.zeros(n, np.int32)
        self.read_agent, self.read_time = np.full(n, NOBODY, np.int32), np.full(n, -1, np.int64)
        self.read_number = np.zeros(n, np.int32)
        # By warp group: products not waited for: the number of their group of products, and cells that they read
        self.in_flight: dict[int, list[tuple[int, Array]]] = {}
        self.fenced = np.full((2, warps), -1, np.int64)  # per warp: the latest fence, and the latest before a barrier
        self.fence_saw = np.full(warps, -1, np.int64)  # the program's barrier before the latest fence

    def load(self, threads: Array, addresses: Array, size: int, vector: int, access: Access) -> Array:
        """(vector, threads)"""
        at = self._at(threads, addresses, size * vector, access)
        self._read(self._cells(at, size * vector), threads[:, None], access)
        return self.bytes.view(UNSIGNED[size])[(at // size)[:, None] + np.arange(vector)].T

    def store(self, threads: Array, addresses: Array, values: list[Array], access: Access) -> None:
        size = values[0].itemsize
        at = self._at(threads, addresses, size * len(values), access)
        self._wrote(self._cells(at, size * len(values)), threads[:, None], access)
        words = self.bytes.view(UNSIGNED[size])
        for k, value in enumerate(values):
            words[at // size + k] = value
        for k, value in enumerate(values):
            if np.count_nonzero(words[at // size + k] != value):
                self._fault("several threads store different values to one place of shared memory at once", access)

    def load_rows(self, threads: Array, addresses: Array, access: Access) -> Array:
        """Rows of 16 bytes for whole warps (warps, rows, 8 halves), as ldmatrix: any thread of a warp may read any."""
        warps, rows = addresses.shape
        at = self._at(threads, addresses.ravel(), 16, access)
        self._read(self._cells(at, 16), threads[:, None], access, whole_warps=True)
        return self.bytes.view(np.uint16)[(at // 2)[:, None] + np.arange(8)].reshape(warps, rows, 8)

    def store_rows(self, threads: Array, addresses: Array, values: Array, access: Access) -> None:
        at = self._at(threads, addresses.ravel(), 16, access)
        self._wrote(self._cells(at, 16), threads[:, None], access, whole_warps=True)
        self.bytes.view(np.uint16)[(at // 2)[:, None] + np.arange(8)] = values.reshape(-1, 8)

    # The tensor cores
    def load_for_product(self, warps: Array, number: int, addresses: Array, size: int, access: Access) -> Array:
        """Elements of so many bytes, read asynchronously by a warp group. number: of the group of products."""
        everyone = 32 * warps[:1]
        at = self._at(np.broadcast_to(everyone, addresses.size), addresses.ravel(), size, access)
        cells = np.unique(self._cells(at, size))
        self._read(cells, np.broadcast_to(everyone, cells.shape), access, several=True)
        times, writers = self.time[cells], self.order.warp_of(self.agent[cells])
        after = self.fenced[1][writers] >= times  # fenced where it was stored, then a barrier
        here = np.ones(cells.shape, bool)  # a barrier, then fenced by all that multiply; or by the one that stored
        for warp in warps.tolist():
            here &= (self.fence_saw[warp] >= times) | ((writers == warp) & (self.fenced[0][warp] >= times))
        if not (after | here | (times < 0)).all():
            self._fault("a product reads shared memory that no fence.proxy.async made ready for it", access)
        self.in_flight.setdefault(int(warps[0]) // 4, []).append((number, cells))
        return self.bytes.view(UNSIGNED[size])[at // size].reshape(addresses.shape)

    def products_done(self, group: int, warps: Array, committed: int) -> None:
        """All products of committed groups before number `committed` have read their operands."""
        left = []
        for number, cells in self.in_flight.pop(group, []):
            if number >= committed:
                left.append((number, cells))
                continue
            self.read_agent[cells] = self.order.several(self.program, np.array(-1))
            self.read_time[cells] = self.order.now
        if left:
            self.in_flight[group] = left

    def fence(self, warps: Array) -> None:
        """Of the asynchronous proxy, by all threads of warps."""
        self.fenced[0][warps] = self.order.now
        self.fence_saw[warps] = self.order.program[self.program].programs[self.program]
        self.order.now += 1

    def barrier(self) -> None:
        self.fenced[1] = self.fenced[0]

    # Checks
    def _at(self, threads: Array, addresses: Array, nbytes: int, access: Access) -> Array:
        at = addresses - addresses.dtype.type(BASE)  # below it: a huge number
        outside = at > at.dtype.type(max(0, self.nbytes - nbytes))
        if np.count_nonzero(outside) or (at.size and self.nbytes < nbytes):
            k = int(outside.argmax())
            raise Fault(
                f"program {self.program}, thread {threads[k]} accesses {nbytes} bytes at byte "
                f"{int(addresses[k]) - BASE} of shared memory, which has {self.nbytes}: {access.place}"
            )
        if np.count_nonzero(at & at.dtype.type(nbytes - 1)):
            raise Fault(f"a misaligned access of {nbytes} bytes of shared memory: {access.place}")
        return at.astype(np.int64)

    def _cells(self, at: Array, nbytes: int) -> Array:
        first = (at // self.cell)[:, None]
        return first if nbytes <= self.cell else first + np.arange(nbytes // self.cell)

    def _read(
        self, cells: Array, threads: Array, access: Access, whole_warps: bool = False, several: bool = False
    ) -> None:
        who = threads if threads.shape == cells.shape else np.broadcast_to(threads, cells.shape)
        times = self.time[cells]
        if np.count_nonzero(times < 0):
            self._fault("a load of shared memory that nobody wrote", access)
        if np.count_nonzero(times > self.order.program[self.program].programs[self.program]):
            self._race(cells, who, self.agent[cells], times, self.number[cells], access, whole_warps, several)
        if several:
            self.read_agent[cells], self.read_time[cells] = (
                self.order.several(self.program, np.array(-1)),
                self.order.now,
            )
        elif whole_warps:
            merge_readers(self.order, self.program, who, cells, self.read_agent, self.read_time)
            lone = self.order.warp_of(self.read_agent[cells]) == who // 32
            self.read_agent[cells[lone]] = self.order.several(self.program, who[lone] // 32)
        else:
            merge_readers(self.order, self.program, who, cells, self.read_agent, self.read_time)
        self.read_number[cells] = access.number

    def _wrote(self, cells: Array, threads: Array, access: Access, whole_warps: bool = False) -> None:
        who = threads if threads.shape == cells.shape else np.broadcast_to(threads, cells.shape)
        known = self.order.program[self.program].programs[self.program]
        for agent, time, number in (
            (self.agent, self.time, self.number),
            (self.read_agent, self.read_time, self.read_number),
        ):
            times = time[cells]
            if np.count_nonzero(times > known):
                self._race(cells, who, agent[cells], times, number[cells], access, whole_warps)
        if self.in_flight:
            reading = np.zeros(self.time.size, bool)
            for products in self.in_flight.values():
                for _, read in products:
                    reading[read] = True
            if np.count_nonzero(reading[cells]):
                self._fault("a store to shared memory that a product may still read", access)
        mine = self.order.several(self.program, who // 32) if whole_warps else self.order.agent(self.program, who)
        self.agent[cells], self.time[cells], self.number[cells] = mine, self.order.now, access.number

    def _race(
        self,
        cells: Array,
        who: Array,
        agents: Array,
        times: Array,
        numbers: Array,
        access: Access,
        whole_warps: bool,
        several: bool = False,
    ) -> None:
        if several:
            ok = times <= self.order.program[self.program].programs[self.program]
        else:
            ok = self.order.before(self.program, who, agents, times)
            if whole_warps:  # even what the thread that gives the address did itself
                synced = np.maximum(self.order.warp_synced[self.program, who // 32], 0)
                ok &= ~((agents == self.order.agent(self.program, who)) & (times > synced))
        if np.count_nonzero(ok) != ok.size:
            k = np.flatnonzero(~ok.ravel())[0]
            other = self.memory.accesses[int(numbers.ravel()[k])]
            assert other is not None
            between = "warps" if self.order.warp_of(agents).ravel()[k] != who.ravel()[k] // 32 else "threads of a warp"
            self.memory.fault(
                ("shared", access.number, other.number),
                f"a race between {between} in shared memory, byte {int(cells.ravel()[k]) * self.cell} of program "
                f"{self.program}: {access.place}, and {other.place}: no barrier between them",
            )

    def _fault(self, what: str, access: Access) -> None:
        self.memory.fault((what, access.number), f"{what}: {access.place}")
