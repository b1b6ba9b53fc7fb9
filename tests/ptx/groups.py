"""Threads of a program at one place: their registers, how groups split and join, and the products they wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .decoder import Operation
from .tensors import Access, Tensor

if TYPE_CHECKING:
    from .machine import Program

Array = np.ndarray


class Group:
    """Threads of a program at one place. threads: their numbers, ascending."""

    def __init__(self, program: Program, threads: Array, registers: list[Array], pc: int) -> None:
        self.program, self.threads, self.registers, self.pc = program, threads, registers, pc
        self.size = threads.size
        self.together = self._together()
        self.waits_for: tuple[Tensor, int] | None = None  # a tensor, and how many stores to it
        self.woken_as = 0  # its state when it was woken last, although nothing was stored
        self.unfenced: set[int] = set()  # registers that the next wgmma.fence covers
        self.committed = 0  # groups of products
        self.pending: list[tuple[int, frozenset[int], frozenset[int]]] = []  # products: group, registers, accumulators
        self.ever_fenced = False

    def _together(self) -> int:
        """In blocks of how many neighbours the threads are complete: 128 (warp groups), 32 (warps) or 0."""
        for block in (128, 32):
            if self.size % block == 0:
                blocks = self.threads.reshape(-1, block)
                if (blocks[:, 0] % block == 0).all() and (np.diff(blocks, axis=1) == 1).all():
                    return block
        return 0

    def full(self, slot: int) -> Array:
        """A register's value for each thread."""
        value = self.registers[slot]
        return value if value.size == self.size else np.repeat(value, self.size)

    def taking_part(self, guard: Any, addresses: Array) -> tuple[Array | None, Array, Array]:
        """Which of the group's threads an instruction is for (None: all), their numbers, and their addresses."""
        if addresses.size != self.size:
            addresses = np.repeat(addresses, self.size)
        if guard is None:
            return None, self.threads, addresses
        mask = guard(self.registers)
        if mask.size != self.size:
            mask = np.repeat(mask, self.size)
        lanes = np.flatnonzero(mask)
        if lanes.size == self.size:
            return None, self.threads, addresses
        return lanes, self.threads[lanes], addresses[lanes]

    def row_addresses(self, addresses: Array, count: int) -> tuple[Array, Array]:
        """Of ldmatrix: the threads that give the addresses of `count` matrices' rows, and these (warps, 8 * count)."""
        if addresses.size != self.size:
            addresses = np.repeat(addresses, self.size)
        rows = 8 * count
        return self.threads.reshape(-1, 32)[:, :rows].ravel(), addresses.reshape(-1, 32)[:, :rows]

    def state(self) -> int:
        return hash((self.pc, *(x.tobytes() for x in self.registers)))

    @property
    def warps(self) -> Array:
        return self.threads[::32] // 32

    def split(self, mask: Array) -> tuple[Group, Group]:
        """The threads where `mask` is set, and the others."""
        parts = []
        for lanes in (np.flatnonzero(mask), np.flatnonzero(~mask)):
            registers = [x if x.size == 1 else x[lanes] for x in self.registers]
            part = Group(self.program, self.threads[lanes], registers, self.pc)
            part.unfenced, part.pending = set(self.unfenced), list(self.pending)
            part.committed, part.ever_fenced = self.committed, self.ever_fenced
            parts.append(part)
        return parts[0], parts[1]

    def join(self, other: Group) -> Group:
        threads = np.concatenate([self.threads, other.threads])
        order = np.argsort(threads)
        registers = []
        for slot, (a, b) in enumerate(zip(self.registers, other.registers, strict=True)):
            if a is b or (a.size == b.size == 1 and a[0] == b[0]):
                registers.append(a)
            else:
                registers.append(np.concatenate([self.full(slot), other.full(slot)])[order])
        joined = Group(self.program, threads[order], registers, self.pc)
        joined.unfenced, joined.pending = self.unfenced | other.unfenced, [*self.pending, *other.pending]
        joined.committed = max(self.committed, other.committed)
        joined.ever_fenced = self.ever_fenced and other.ever_fenced
        return joined

    # What synchronizes
    def warp_barrier(self) -> None:
        self.program.order.warp_barrier(self.program.number, self.warps)

    def proxy_fence(self) -> None:
        self.program.shared.fence(self.warps)

    def fence(self, guard: Any, scope: str, sc: bool) -> None:
        _, threads, _ = self.taking_part(guard, self.threads)
        self.program.order.fence(self.program.number, threads, scope, sc)

    # Asynchronous products
    def products_fence(self, _: int) -> None:
        self.unfenced.clear()
        self.ever_fenced = True

    def products_commit_group(self, _: int) -> None:
        self.committed += 1

    def products_wait_group(self, left: int) -> None:
        done = self.committed - left
        self.pending = [product for product in self.pending if product[0] >= done]
        for warps in self.warps.reshape(-1, 4):
            self.program.shared.products_done(int(warps[0]) // 4, warps, done)

    def product_begins(self, registers: frozenset[int], accumulators: frozenset[int], access: Access) -> None:
        if not self.ever_fenced or registers & self.unfenced:
            self.program.memory.fault(
                ("wgmma.fence", access.number),
                f"a product's registers were written after the last wgmma.fence: {access.place}",
            )
        self.pending.append((self.committed, registers, accumulators))

    def watch_registers(self, operation: Operation) -> None:
        """Before an instruction: what products still use must not be changed, and what they make not be read."""
        if operation.instruction.parts[0] == "wgmma":
            return
        self.unfenced |= operation.writes
        for _, registers, accumulators in self.pending:
            if operation.writes & registers or operation.reads & accumulators:
                place = operation.instruction.place
                self.program.memory.fault(
                    ("in flight", place), f"a product that was not waited for has these registers: {place}"
                )
