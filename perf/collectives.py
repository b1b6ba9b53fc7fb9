"""What a process hands to its process groups: counted where every strategy has to pass, in PyTorch's dispatcher."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "broadcast_": "broadcast",
}
NONE = "wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_"
SENT_AT = 200  # tcpi_bytes_sent and tcpi_bytes_retrans in Linux's struct tcp_info


class Collective(NamedTuple):
    """One call. bytes: of the whole message, as all ranks together have it before or after."""

    kind: str
    bytes: int


class Collectives(TorchDispatchMode):
    """Inside of the block, `note` is called with every Collective that this process begins, in their order: those of
    DistributedDataParallel's reducer, of fully_shard, and of functions that are given DTensors.

    A kind that KINDS lacks has the operator's name.
    """

    def __init__(self, note: Callable[[Collective], object]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it says first which collectives it needs
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.namespace in ("c10d", "_c10d_functional") and name not in NONE:
            self.note(Collective(KINDS.get(name, name), max(map(_bytes, (*args, result)))))
        return result


def _bytes(argument: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(argument) if isinstance(leaf, torch.Tensor))


def sent_bytes() -> int:
    """What this process has sent over its TCP connections, which is all that gloo sends: without headers, and without
    other processes' traffic, both of which /proc/net/dev has. Linux only."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            is_socket = os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
        except OSError:  # the listing's own
            continue
        if not is_socket:
            continue
        with socket.socket(fileno=os.dup(int(number))) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                sent, again = struct.unpack_from("=QQ", info, SENT_AT)
                total += sent - again
    return total
