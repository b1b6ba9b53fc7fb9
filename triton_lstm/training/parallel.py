"""How the processes of a run share its model: copies of it (DistributedDataParallel), or shards (fully_shard)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from triton_lstm.training.model import LanguageModel
from triton_lstm.training.processes import Processes


def mesh_of(processes: Processes, device: torch.device) -> DeviceMesh | None:
    """All processes in one dimension; None without torchrun."""
    if processes.group is None:
        return None
    return DeviceMesh.from_group(processes.group, device.type)


def shard(model: LanguageModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Leaves each process a part of every weight. The others are gathered when they are needed, in the dtype that the
    model computes in; the gradients of the head are reduced during the back-propagation through time.

    dtype: in 16 bits, the one of autocast; weights and sums of gradients stay float32.
    """
    # Of an output that is a view; none is changed in place here
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    low = dtype in (torch.bfloat16, torch.float16)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if low else MixedPrecisionPolicy()
    fully_shard(model.lstm, mesh=mesh, mp_policy=policy)
    fully_shard(model.head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)  # it is the first one backward
    fully_shard(model, mesh=mesh, mp_policy=policy)


def replicate(loss: nn.Module, processes: Processes, device: torch.device, *, keep_gradients: bool) -> nn.Module:
    """Reduces gradients in buckets while those of the layers below are computed.

    keep_gradients: `.grad` stays the same memory, as CUDA graphs need it, which takes as much memory again.
    """
    return DistributedDataParallel(
        loss,
        device_ids=[device] if device.type == "cuda" else None,
        process_group=processes.group,
        gradient_as_bucket_view=not keep_gradients,
    )


def rows_as_one(tensor: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """States of this process's rows, (layers, B, H), as a part of those of all rows. Shares their memory."""
    return tensor if mesh is None else DTensor.from_local(tensor, mesh, [Shard(1)], run_check=False)


def whole(tensor: torch.Tensor) -> Any:
    """The whole tensor in every process: gathered if it is a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
