"""Global memory of a launch: tensors with known bounds, who wrote and read their elements, and weak memory.

An element's stores are seen in one order by all. Under weak memory a thread sees a store that did not happen before its
load only after a delay of its own; what it has seen of an element it never unsees.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from .faults import Fault
from .numbers import UNSIGNED
from .order import Order, Release, merged
from .schedule import Schedule
from .tensors import HISTORY, Access, Allowed, Tensor, merge_readers

Array = np.ndarray
GAP = 1 << 12  # bytes between tensors, so that no access beyond one meets another


class Memory:
    """The tensors of a launch. faults: what was found so far, by what is the same about it."""

    def __init__(self, order: Order, schedule: Schedule, allowed: list[Allowed], accesses: list[Access | None]) -> None:
        self.order, self.schedule, self.allowed, self.accesses = order, schedule, allowed, accesses
        self.tensors: list[Tensor] = []
        self.bases = np.empty(0, np.uint64)
        self.next = 1 << 40
        self.settled = np.full((len(order.program), order.threads), -1, np.int64)  # up to when a thread sees everything
        self.faults: dict[Any, str] = {}

    def add(self, name: str, values: Array, written: Array, offset: int, read_only: bool) -> Tensor:
        """offset: of the address from a multiple of 256, which the kernel may rely on."""
        tensor = Tensor(name, values, written, self.next + offset % 256, read_only)
        self.next = -(-(tensor.base + tensor.nbytes) // 256) * 256 + GAP
        self.tensors.append(tensor)
        self.bases = np.array([t.base for t in self.tensors], np.uint64)
        return tensor

    def at(self, address: int) -> Tensor | None:
        """The tensor at an address."""
        k = int(np.searchsorted(self.bases, np.uint64(address), "right")) - 1
        return self.tensors[k] if k >= 0 else None

    def fault(self, key: Any, text: str) -> None:
        self.faults.setdefault(key, text)

    # What instructions call. threads: who. addresses: of each. Results have a row for each element of the vector.
    def load(self, program: int, threads: Array, addresses: Array, size: int, vector: int, access: Access) -> Array:
        out = np.empty((vector, threads.size), UNSIGNED[size])
        for tensor, chosen, i in self._elements(program, threads, addresses, size, vector, access):
            who = np.broadcast_to(threads[chosen][:, None], i.shape)
            values, times = tensor.values[i], None
            if not tensor.read_only:
                times = tensor.time[i]
                ok = self.order.before(program, who, tensor.agent[i], times)
                if np.count_nonzero(ok) != ok.size:
                    self._race(tensor, program, who, i, ~ok, access, tensor.agent[i], tensor.number[i])
                    if self.schedule.weak:
                        values, times = self._seen(tensor, program, who, i, ok, access)
                self._note_readers(tensor, program, who, i, access)
                if access.strong and tensor.releases:
                    self._acquire(tensor, program, who, i, times, access)
            if not tensor.all_given:
                nobody = ~tensor.given[i] if times is None else ~tensor.given[i] & (times < 0)
                if np.count_nonzero(nobody):
                    self._name(tensor, program, who, i, nobody, "reads what nobody wrote", access)
            out[:, chosen] = np.ascontiguousarray(values).view(UNSIGNED[size]).reshape(-1, vector).T
        self.order.now += 1
        return out

    def store(
        self, program: int, threads: Array, addresses: Array, values: list[Array], access: Access, late: bool
    ) -> None:
        size = values[0].itemsize
        for tensor, chosen, i in self._elements(program, threads, addresses, size, len(values), access):
            who = np.broadcast_to(threads[chosen][:, None], i.shape)
            bits = np.stack([x[chosen] for x in values], 1).view(UNSIGNED[tensor.size]).reshape(i.shape)
            if tensor.read_only:
                raise Fault(f"{tensor.name} is an input, and stored to: {access.place}")
            self._check_store(tensor, program, who, i, access)
            self._write(tensor, program, who, i, bits, access, late)
            if np.count_nonzero(tensor.agent[i] != self.order.agent(program, who)):
                text = f"several threads store one element of {tensor.name} at once: {access.place}"
                self.fault(("twice", tensor.name, access.number), text)
            if access.strong:
                for thread, elements in zip(threads[chosen].tolist(), i.tolist(), strict=True):
                    for element in elements:
                        self._release(tensor, program, thread, element, access, [])
        self.order.now += 1

    def atomic(
        self, program: int, threads: Array, addresses: Array, operation: Any, values: list[Array], access: Access
    ) -> Array:
        """One thread after the other; each reads the latest store. operation: of the old value and `values`."""
        out = np.zeros(threads.size, values[0].dtype)
        for tensor, chosen, elements in self._elements(program, threads, addresses, values[0].itemsize, 1, access):
            if tensor.read_only:
                raise Fault(f"{tensor.name} is an input, and stored to: {access.place}")
            for lane, e in zip(np.arange(threads.size)[chosen].tolist(), elements, strict=True):
                change = [x[lane : lane + 1] for x in values]
                out[lane] = self._one_atomic(tensor, program, threads[lane : lane + 1], e, operation, change, access)[0]
        return out

    def _one_atomic(
        self, tensor: Tensor, program: int, who: Array, e: Array, operation: Any, values: list[Array], access: Access
    ) -> Array:
        self._check_store(tensor, program, who, e, access)
        if not tensor.given[e[0]] and tensor.time[e[0]] < 0:
            self._name(tensor, program, who, e, np.array([True]), "reads what nobody wrote", access)
        thread, element, old = int(who[0]), int(e[0]), tensor.values[e]
        handed = tensor.releases.get(element, {}).get(int(tensor.time[element]), [])
        if access.ordering in ("acquire", "acq_rel"):
            self.order.acquire(program, thread, access.scope, handed)
        elif handed:
            self.order.read.setdefault((program, thread), []).extend(handed)
        stores, new = tensor.version, operation(old, *values)
        self._write(tensor, program, who, e, new, access, False)
        tensor.version = stores + bool(new[0] != old[0])  # adding 0 is a look
        self._release(tensor, program, thread, element, access, handed)
        self.order.now += 1
        return old

    # Where
    def _elements(self, program: int, threads: Array, addresses: Array, size: int, vector: int, access: Access) -> Any:
        """For each tensor that is accessed: itself, which threads, and the elements of each (threads, elements)."""
        if threads.size == 0:
            return
        nbytes = size * vector
        if np.count_nonzero(addresses & np.uint64(nbytes - 1)):
            raise Fault(f"a misaligned access of {nbytes} bytes: {access.place}")
        which = np.searchsorted(self.bases, addresses, "right") - 1
        for k in which[:1].tolist() if (which == which[0]).all() else np.unique(which).tolist():
            chosen = slice(None) if which.min() == which.max() else which == k
            tensor = self.tensors[k]
            offset = (addresses[chosen] - np.uint64(tensor.base)).astype(np.int64)
            if k < 0 or offset.max() + nbytes > tensor.nbytes:
                thread = threads[chosen][offset.argmax()]
                near = "no tensor" if k < 0 else f"byte {offset.max()} of {tensor.name}, which has {tensor.nbytes}"
                raise Fault(f"program {program}, thread {thread} accesses {nbytes} bytes at {near}: {access.place}")
            if size < tensor.size or offset[0] % tensor.size:  # a vector's elements are accesses of their own
                raise Fault(f"an access of {size} bytes splits elements of {tensor.name}: {access.place}")
            yield tensor, chosen, (offset // tensor.size)[:, None] + np.arange(nbytes // tensor.size)

    # Races
    def _check_store(self, tensor: Tensor, program: int, who: Array, i: Array, access: Access) -> None:
        ok = self.order.before(program, who, tensor.agent[i], tensor.time[i])
        if np.count_nonzero(ok) != ok.size:
            self._race(tensor, program, who, i, ~ok, access, tensor.agent[i], tensor.number[i])
        for readers in tensor.readers.values():
            times = readers.time[i]
            if times.max() == 0:
                continue
            ok = self.order.before(program, who, readers.agent[i], times)
            if np.count_nonzero(ok) != ok.size:
                self._race(tensor, program, who, i, ~ok, access, readers.agent[i], readers.number[i])

    def _race(
        self,
        tensor: Tensor,
        program: int,
        who: Array,
        i: Array,
        wrong: Array,
        access: Access,
        agents: Array,
        numbers: Array,
    ) -> None:
        mine = agents // self.order.agents == program
        for number, same in itertools.product(np.unique(numbers[wrong]).tolist(), (True, False)):
            pair = wrong & (numbers == number) & (mine == same)
            if not np.count_nonzero(pair):
                continue
            k = np.flatnonzero(pair.ravel())[0]
            agent = int(agents.ravel()[k])
            key = ("race", tensor.name, access.number, number, same)
            if key in self.faults:
                continue
            other = self.accesses[number]
            assert other is not None
            if access.strong_with(other, same):
                continue
            words = frozenset({access.words, other.words})
            if any(a.tensor in tensor.name.split("=") and a.pair == words for a in self.allowed):
                continue
            who_else = f"program {agent // self.order.agents}" + (
                f", thread {agent % self.order.agents}" if agent % self.order.agents < self.order.threads else ""
            )
            self.fault(
                key,
                f"a race on {tensor.name}, element {int(i.ravel()[k])}: program {program}, thread "
                f"{int(who.ravel()[k])}, {access.place}, and {who_else}, {other.place}: nothing orders them",
            )

    def _note_readers(self, tensor: Tensor, program: int, who: Array, i: Array, access: Access) -> None:
        readers = tensor.readers_of(program)
        merge_readers(self.order, program, who, i, readers.agent, readers.time)
        readers.number[i] = access.number

    def _name(
        self, tensor: Tensor, program: int, who: Array, i: Array, wrong: Array, what: str, access: Access
    ) -> None:
        k = np.flatnonzero(wrong.ravel())[0]
        self.fault(
            (what, tensor.name, access.number),
            f"program {program}, thread {int(who.ravel()[k])} {what}, element {int(i.ravel()[k])} of {tensor.name}: "
            f"{access.place}",
        )

    # Stores, and what is seen of them
    def _write(
        self, tensor: Tensor, program: int, who: Array, i: Array, bits: Array, access: Access, late: bool
    ) -> None:
        if self.schedule.weak:
            tensor.push(i)
        tensor.values[i] = bits
        tensor.agent[i], tensor.time[i], tensor.number[i] = (
            self.order.agent(program, who),
            self.order.now,
            access.number,
        )
        tensor.late[i] = late
        tensor.version += 1

    def _seen(
        self, tensor: Tensor, program: int, who: Array, i: Array, ok: Array, access: Access
    ) -> tuple[Array, Array]:
        """The values, and the times of their stores, that the threads see of the elements."""
        values, times = tensor.values[i], tensor.time[i]
        hidden = ~ok & ~self._visible(program, who, i, times, tensor.late[i], access)
        for old_values, old_agents, old_times, old_late in tensor.older if np.count_nonzero(hidden) else ():
            values = np.where(hidden, old_values[i], values)
            times = np.where(hidden, old_times[i], times)
            hidden &= ~self.order.before(program, who, old_agents[i], times)
            hidden &= ~self._visible(program, who, i, times, old_late[i], access)
            if not np.count_nonzero(hidden):
                break
        return values, times

    def _visible(self, program: int, who: Array, i: Array, times: Array, late: Array, access: Access) -> Array:
        if access.cached:
            return np.zeros(i.shape, bool)
        settled = times <= self.settled[program, who]
        seen = ~late | settled
        if np.count_nonzero(seen) != seen.size:
            seen |= (
                times + self.schedule.delay(i, self.order.agent(program, who), np.full(i.shape, program), times)
                <= self.order.now
            )
        return seen

    def _release(
        self, tensor: Tensor, program: int, thread: int, element: int, access: Access, inherited: list[Release]
    ) -> None:
        """Attaches to the latest store of an element what its acquirers get to know."""
        handed = [*inherited, *self.order.fenced.get((program, thread), [])]
        if access.ordering in ("release", "acq_rel"):
            handed.append(self.order.release(program, thread, access.scope))
        if handed:
            by_time = tensor.releases.setdefault(element, {})
            by_time[int(tensor.time[element])] = merged(handed)
            if len(by_time) > HISTORY + 1:
                del by_time[min(by_time)]  # too old to be seen

    def _acquire(self, tensor: Tensor, program: int, who: Array, i: Array, times: Array, access: Access) -> None:
        for thread, element, time in zip(who.ravel().tolist(), i.ravel().tolist(), times.ravel().tolist(), strict=True):
            handed = tensor.releases.get(element, {}).get(time, [])
            if not handed:
                continue
            if access.ordering == "acquire":
                self.order.acquire(program, thread, access.scope, handed)
            else:
                self.order.read.setdefault((program, thread), []).extend(handed)
