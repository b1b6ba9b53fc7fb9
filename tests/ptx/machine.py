"""Runs a kernel: programs with shared memory, their warps with a program counter each, and who runs when.

Threads at one place run together, as one operation on arrays. A group of them splits where they branch apart, and
becomes one again where they meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .decoder import SPECIAL, Operation
from .faults import Fault
from .groups import Group
from .kernel import Kernel
from .memory import Memory
from .numbers import UNSIGNED
from .order import Order
from .schedule import Schedule
from .shared import Shared
from .tensors import Access, Allowed

Array = np.ndarray
ENDLESS = 200_000  # accesses of a program, or branches without one, after which a loop is said to be endless
LOOKS = 1000  # of a loop that counts, after which it is said to wait forever although it would end


class Program:
    """One program of a launch."""

    def __init__(
        self,
        kernel: Kernel,
        number: int,
        index: Sequence[int],
        grid: Sequence[int],
        parameters: list[Array],
        memory: Memory,
        shared: int,
    ) -> None:
        self.kernel, self.number, self.memory, self.order = kernel, number, memory, memory.order
        self.shared = Shared(memory, number, shared, kernel.cell, kernel.threads // 32)
        self.accesses = 0
        self.branches = 0  # since the last access
        self.polls: dict[Any, tuple[int, int]] = {}
        self.woken = 0
        self.counts = False  # whether a poll that was woken changed registers: its loop may end by itself
        threads = np.arange(kernel.threads)
        special = dict(
            zip(SPECIAL[:3], (x.astype(np.uint32) for x in (threads, threads % 32, threads // 32)), strict=True)
        )
        special["%ntid.x"] = np.array([kernel.threads], np.uint32)
        for kind, values in (("", index), ("n", grid)):
            special |= {f"%{kind}ctaid.{axis}": np.array([v], np.uint32) for axis, v in zip("xyz", values, strict=True)}
        registers = list(kernel.initial)
        for name, value in special.items():
            if name in kernel.slots:
                registers[kernel.slots[name]] = value
        for k, value in enumerate(parameters):
            if ("parameter", k) in kernel.slots:
                registers[kernel.slots["parameter", k]] = value
        self.groups = [Group(self, threads, registers, 0)]

    def store(self, threads: Array, addresses: Array, values: list[Array], access: Access) -> None:
        late = self.memory.schedule.late(self.number, self.accesses)
        self.memory.store(self.number, threads, addresses, values, access, late)

    # Who runs
    def ready(self) -> bool:
        return any(self._can_run(group) for group in self.groups)

    def _can_run(self, group: Group) -> bool:
        if group.waits_for is not None:
            tensor, stores = group.waits_for
            if tensor.version < stores:
                return False
            group.waits_for = None
        operation = self.kernel.operations[group.pc]
        return operation.kind != "barrier" and group.together >= operation.collective

    def wake(self) -> None:
        """Has polls look again, although nothing was stored."""
        self.woken += 1
        self.counts = False
        for group in self.groups:
            if group.waits_for is not None:
                group.waits_for, group.woken_as = None, group.state()

    def turn(self, choice: int | None) -> None:
        """One group runs: at most one access to global memory, and all up to the next one."""
        runnable = [group for group in self.groups if self._can_run(group)]
        self._advance(min(runnable, key=lambda g: g.pc) if choice is None else runnable[choice % len(runnable)])
        if len(self.groups) > 1:
            self._join()
        self._barrier()

    def _advance(self, group: Group) -> None:
        operations, accessed = self.kernel.operations, False
        while True:
            operation = operations[group.pc]
            if operation.collective > group.together or operation.kind == "barrier":
                break
            if self.kernel.has_products:
                group.watch_registers(operation)
            if operation.kind == "plain":
                if group.together and not self.kernel.has_products:
                    runs, end = self.kernel.straight(group.pc)
                    for run in runs:
                        run(group)
                    group.pc = end
                else:
                    operation.run(group)
                    group.pc += 1
            elif operation.kind == "global":
                if accessed:
                    return
                if operation.polled and self._sleeps(group, operation):
                    return
                operation.run(group)
                self.accesses += 1
                if self.accesses > ENDLESS:
                    raise Fault(f"a loop that never ends: {operation.instruction.place}")
                accessed = True
                self.branches = 0
                group.pc += 1
            elif operation.kind == "return":
                self.groups.remove(group)
                return
            else:
                self.branches += 1
                if self.branches > ENDLESS:
                    raise Fault(f"a loop that never ends: {operation.instruction.place}")
                taken = operation.run(group)
                count = None if taken is None else np.count_nonzero(taken)
                if count is None or count == taken.size:
                    group.pc = operation.target
                elif count == 0:
                    group.pc += 1
                else:
                    there, here = group.split(taken)
                    there.pc, here.pc = operation.target, group.pc + 1
                    self.groups.remove(group)
                    self.groups += [there, here]
                    return
            if len(self.groups) > 1 and any(g.pc == group.pc for g in self.groups if g is not group):
                return

    def _join(self) -> None:
        """Makes one group of those that have met."""
        places: dict[int, Group] = {}
        apart = []
        for group in self.groups:
            if group.waits_for is not None:
                apart.append(group)
            else:
                places[group.pc] = places[group.pc].join(group) if group.pc in places else group
        self.groups = [*apart, *places.values()]

    def _barrier(self) -> None:
        """Lets everyone go on if all have arrived; a Fault if somebody never will."""
        if not self.groups or any(group.waits_for is not None or self._can_run(group) for group in self.groups):
            return
        places = [self.kernel.operations[group.pc].instruction for group in self.groups]
        if len(self.groups) == 1 and self.groups[0].size == self.kernel.threads:
            while self.kernel.operations[self.groups[0].pc].kind == "barrier":  # two may follow each other
                self.order.barrier(self.number)
                self.shared.barrier()
                self.groups[0].pc += 1
            return
        waiting = "; ".join(
            f"threads {_ranges(g.threads)} at {p.place}" for g, p in zip(self.groups, places, strict=True)
        )
        raise Fault(
            f"program {self.number}: not all threads reach a barrier. {waiting}; others have returned or are elsewhere"
        )

    def _sleeps(self, group: Group, operation: Operation) -> bool:
        """Whether a poll looks at what it has seen: then it waits for stores."""
        assert operation.polled is not None
        address = operation.polled(group)
        if address is None:
            return False
        tensor = self.memory.at(address)
        if tensor is None or tensor.read_only:
            return False
        key, seen = (group.pc, address, int(group.threads[0])), (tensor.version, self.woken)
        if self.polls.get(key) == seen:
            group.waits_for = tensor, tensor.version + 1
            self.counts |= self.woken > 0 and group.state() != group.woken_as
            return True
        self.polls[key] = seen
        return False


def _ranges(threads: Array) -> str:
    """0-31, 64-127"""
    cuts = np.flatnonzero(np.diff(threads) != 1)
    first, last = threads[np.r_[0, cuts + 1]], threads[np.r_[cuts, threads.size - 1]]
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in zip(first, last, strict=True)]
    return ", ".join([*shown[:4], "..."] if len(shown) > 4 else shown)


def run(
    kernel: Kernel,
    arguments: Sequence[tuple[str, Array, Array, int, bool] | int],
    grid: Sequence[int],
    shared: int,
    *,
    cooperative: bool,
    schedule: Schedule,
    allowed: Sequence[Allowed] = (),
    patience: int = 5,
) -> Memory:
    """Runs a launch.

    arguments: of each parameter an integer, or a tensor: its name, values (flat unsigned integers, changed in place),
        which of them had been written, the offset of its address, and whether it is an input.
    shared: bytes. cooperative: whether all programs are there at once; if not they run one after the other.
    patience: how often programs that wait for each other look again before they are said to wait forever.

    Raises Fault for all that was found.
    """
    programs_there = int(np.prod(grid))
    order = Order(programs_there, kernel.threads)
    memory = Memory(order, schedule, list(allowed), kernel.accesses)
    parameters = []
    for size, argument in zip(kernel.parameters, [*arguments, 0, 0][: len(kernel.parameters)], strict=True):
        value = argument if isinstance(argument, int) else memory.add(*argument).base
        parameters.append(np.array([value & (1 << 8 * size) - 1], UNSIGNED[size]))
    programs = []
    for z, y, x in np.ndindex(*reversed(tuple(grid))):
        programs.append(Program(kernel, len(programs), (x, y, z), grid, parameters, memory, shared))
    with np.errstate(all="ignore"):
        try:
            for together in [programs] if cooperative else [[program] for program in programs]:
                _together(together, memory, schedule, patience)
        except Fault as fault:  # after others, perhaps
            memory.fault("the end", str(fault))
    if memory.faults:
        raise Fault("\n".join([f"{kernel.text.name}, {schedule}:", *memory.faults.values()]))
    return memory


def _together(programs: list[Program], memory: Memory, schedule: Schedule, patience: int) -> None:
    """Runs programs that may wait for each other."""
    active, current = list(programs), programs[0]
    looked: list[int] = []  # programs that looked again since the last store
    stores = -1
    while active:
        draw = schedule.switch(current.number, current.accesses)
        if draw is not None or not current.ready():
            ready = [program for program in active if program.ready()]
            if not ready:
                total = sum(tensor.version for tensor in memory.tensors)
                looked = looked if total == stores else []
                stores = total
                most = patience if schedule.weak else 1
                again = [p for p in active if looked.count(p.number) < (LOOKS if p.counts else most)]
                if not again:
                    where = "; ".join(_where(program) for program in active)
                    raise Fault(f"programs wait for each other forever ({schedule}): {where}")
                current = again[schedule.pick(current.number, len(looked)) % len(again)]
                late = looked.count(current.number) - schedule.late_looks
                if late >= 0:
                    some = schedule.half(current.number, current.accesses, memory.order.threads) if late == 0 else True
                    memory.settled[current.number][some] = memory.order.now
                looked.append(current.number)
                current.wake()
                continue
            later = [p for p in ready if p.number > current.number]
            current = ready[draw % len(ready)] if draw is not None else (later or ready)[0]
        current.turn(draw)
        if not current.groups:
            active.remove(current)
            current = active[0] if active else current


def _where(program: Program) -> str:
    places = {program.kernel.operations[group.pc].instruction.source for group in program.groups}
    return f"program {program.number} at {', '.join(sorted(places))}"
