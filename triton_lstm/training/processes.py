"""The processes that train one model together, as torchrun starts them: who they are, and what they tell each other."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from triton_lstm.settings import UsageError
from triton_lstm.system.signals import signals_end_process

MEETING = timedelta(minutes=5)  # for all processes to start
PREPARING = timedelta(days=1)  # while one of them reads the text
POLL_S = 0.02
GRACE_S = 10.0  # in which processes that gave up waiting say so
NETWORK = "gloo", "nccl", "connection", "socket", "broken pipe", "tcpstore"  # in the errors of a collective
T = TypeVar("T")


class ReportedError(UsageError):
    """An error that another process reports for this one."""


class Processes:
    """This process and the others of its run; without torchrun it is alone, and nothing here communicates.

    Attributes:
        rank, size: of this process, and how many there are. local_rank, local_size: on this machine.
        group: for tensors on the device, within the time limit; None for a single process without torchrun.
        at: what this process does, for the message of those that wait for it.
    """

    rank, size, local_rank, local_size = 0, 1, 0, 1
    group: dist.ProcessGroup | None = None
    at = "prepares"

    def __init__(self, store: dist.Store | None = None) -> None:
        self._store = store
        self._hosts = [socket.gethostname()]
        self._control: dist.ProcessGroup | None = None
        if store is None:
            return
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self._preparing = dist.new_group(timeout=PREPARING, backend="gloo")
        self._hosts = self.gather(self._hosts[0])

    @property
    def place(self) -> tuple[int, int]:
        """rank, size."""
        return self.rank, self.size

    @property
    def started_by_torchrun(self) -> bool:
        return self._store is not None

    @property
    def may_be_restarted(self) -> bool:
        """Whether torchrun starts these processes again if one fails, and may have done so: it does not count the
        restarts because of other machines."""
        return self.started_by_torchrun and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"

    def open(self, device: torch.device, timeout: float) -> None:
        """Makes the groups in which processes wait for each other for at most `timeout` seconds."""
        if self._store is None:
            return
        limit = timedelta(seconds=timeout)
        self._control = self.group = dist.new_group(timeout=limit, backend="gloo")
        if device.type == "cuda":
            # NCCL ends the process when it has waited: later than `any`, which can say for whom
            self.group = dist.new_group(timeout=2 * limit, backend="cpu:gloo,cuda:nccl")

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in one process."""
        if self._control is None or self.size == 1:
            return flag
        found = torch.tensor([int(flag)])
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._control)
        return bool(found)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes; changes `tensor`."""
        if self.group is not None and self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, value: T) -> list[T]:
        """The value of every rank. Before `open` it waits for as long as preparing the text may take."""
        if self._store is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control or self._preparing)
        return values

    def checked(self, function: Callable[[], T]) -> T:
        """The function's result. A UsageError in one process is one in all of them, with rank 0 to report it."""
        result, error = None, None
        try:
            result = function()
        except UsageError as raised:
            error = raised
            if self._store is None:
                raise
        errors = self.gather(None if error is None else str(error))
        if not any(message is not None for message in errors):
            return result  # type: ignore[return-value]
        if self.rank:
            raise ReportedError
        first = next(rank for rank, message in enumerate(errors) if message is not None)
        where = "" if first == 0 else f"{self._name(first)}: "
        raise UsageError(f"{where}{errors[first]}") from None

    def from_rank_zero(self, function: Callable[[], T]) -> T:
        """What the function returned in rank 0, the only one that calls it; its UsageErrors are for all processes."""
        return self.gather(self.checked(lambda: function() if self.rank == 0 else None))[0]  # type: ignore[return-value]

    def check_alike(self, values: dict[str, Any]) -> None:
        """Raises UsageError in all processes if a value is not the same in all of them. The keys say what it is."""
        first, *others = self.gather(values)
        for rank, found in enumerate(others, 1):
            for what in first | found:
                here, there = first.get(what), found.get(what)
                if here == there:
                    continue
                if self.rank:
                    raise ReportedError
                why = f"{self._name(rank)} has another {what} than {self._name(0)}: {there}, not {here}"
                raise UsageError(f"{why}. Give all processes the same")

    def explain(self, error: BaseException) -> str | None:
        """Why a collective failed, for a user: which process did not respond, or that one ended; None for any other
        error. Raises ReportedError if another process says so."""
        text = str(error).lower()
        if self.size == 1 or not isinstance(error, RuntimeError) or not any(word in text for word in NETWORK):
            return None
        with contextlib.suppress(RuntimeError):  # the store may have ended as well
            if "timed out" in text or "timeout" in text:
                return self._late()
        if self.rank:
            raise ReportedError
        return "another process of this run has ended"

    def _late(self) -> str:
        """Who is not among those that have given up waiting."""
        assert self._store is not None
        self._store.set(f"waited/{self.rank}", self.at)
        time.sleep(GRACE_S)
        late = [rank for rank in range(self.size) if not self._store.check([f"waited/{rank}"])]
        if min(set(range(self.size)) - set(late)) != self.rank:
            raise ReportedError
        who = ", ".join(map(self._name, late)) or "the network"
        return f"{who} did not respond for the --timeout, while {self._name(self.rank)} was at {self.at}"

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}" if len(set(self._hosts)) > 1 else f"rank {rank}"


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Joins the processes that torchrun has started for this run; alone if it has not started this one.

    Raises UsageError if they cannot be reached.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Processes()
        return
    if not dist.is_available():
        raise UsageError("this build of PyTorch cannot train in several processes. Start one without torchrun")
    try:
        with signals_end_process():
            processes = _join()
    except (RuntimeError, ValueError, OSError) as error:
        why = str(error).splitlines()[0][:200]
        raise UsageError(f"cannot join the other processes ({why}). Start all of them with torchrun") from None
    yield processes
    dist.destroy_process_group()  # not after an error: others may be gone


def _join() -> Processes:
    from torch.distributed.rendezvous import rendezvous

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not 0 <= rank < size:
        raise ValueError(f"RANK is {rank}, WORLD_SIZE {size}")
    store, rank, size = next(rendezvous("env://", timeout=MEETING))
    store = _unused_part(store, rank, size)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=MEETING)
    return Processes(dist.PrefixStore("triton_lstm", store))


def _unused_part(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of the store that only these processes know.

    torchrun restarts processes with the store of those before, whose keys would mislead process groups, and counts
    restarts on each machine for itself. So all give themselves a new name, until rank 0 knows the names of all.
    """
    own = uuid.uuid4().hex
    store.set(f"name/{rank}", own)
    end = time.monotonic() + MEETING.total_seconds()
    while time.monotonic() < end:
        if rank == 0:
            names = ",".join(store.get(f"name/{other}").decode() for other in range(size))
            store.set("names", names)
            heard = [f"heard/{other}" for other in range(1, size)]
            if not heard or (store.check(heard) and all(store.get(key).decode() == names for key in heard)):
                store.set("complete", names)
        else:
            names = store.get("names").decode()
            if own in names:
                store.set(f"heard/{rank}", names)
        if own in names and store.check(["complete"]) and store.get("complete").decode() == names:
            return dist.PrefixStore(names.partition(",")[0], store)
        time.sleep(POLL_S)
    raise RuntimeError(f"not all {size} processes have started within {MEETING.total_seconds():.0f} s")
