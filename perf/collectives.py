"""What a process hands to its process groups: counted where every strategy has to pass, in PyTorch's dispatcher."""

from __future__ import annotations

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


class Collective(NamedTuple):
    """One call. bytes: of the whole message, as all ranks together have it before or after."""

    kind: str
    bytes: int


class Collectives(TorchDispatchMode):
    """Inside of the block, `note` is called with every Collective that this process begins, in their order: those of
    DistributedDataParallel's reducer, of fully_shard, and of functions that are given DTensors.

    Another kind than those of KINDS has the operator's name.
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
        if func.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            self.note(Collective(KINDS.get(name, name), max(map(_bytes, (*args, result)))))
        return result


def _bytes(argument: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(argument) if isinstance(leaf, torch.Tensor))
