"""vmap's rules for a layer: the mapped axis becomes part of the batch, unless weights or packed rows are mapped too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Where the batch is in each argument and result of a layer (see arguments.py); None: it has none
ARGUMENTS: dict[str, Any] = dict(
    x=1, h0=1, c0=1, w_ih=None, w_hh=None, b_ih=None, b_hh=None, r0=0, starts=None, lengths=None, resets=1
)
RESULTS = dict(y=1, h_n=1, c_n=1, gates=1, c=1)
SAVED = dict(y=1, gates=1, c=1)


def forward_rule(function: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
    """For LSTMFunction."""
    return _map(function, info.batch_size, in_dims, inputs, [*ARGUMENTS.values(), None, None], [*RESULTS.values()])


def backward_rule(function: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
    """For LSTMBackward."""
    axes = [*RESULTS.values(), *ARGUMENTS.values(), *SAVED.values(), None]
    return _map(function, info.batch_size, in_dims, inputs, axes, [RESULTS["y"], ARGUMENTS["c0"]])


def _map(
    function: Callable[..., Any],
    size: int,
    in_dims: tuple[Any, ...],
    inputs: tuple[Any, ...],
    axes: list[int | None],
    result_axes: list[int],
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The results for all `size` elements of the mapped axis, and where that axis is in each."""
    arguments = list(zip(inputs, in_dims, axes, strict=True))
    if any(axis is None and (dim is not None or _is_index(argument)) for argument, dim, axis in arguments):
        return _one_by_one(function, size, arguments)
    results = function(
        *(argument if axis is None else _fold(argument, dim, axis, size) for argument, dim, axis in arguments)
    )
    pairs = list(zip(results, result_axes, strict=True))
    unfolded = tuple(
        None if out is None else out.unflatten(axis, (size, out.shape[axis] // max(size, 1))) for out, axis in pairs
    )
    return unfolded, tuple(None if out is None else axis for out, axis in pairs)


def _is_index(argument: Any) -> bool:
    """Whether it is starts or lengths: packed rows cannot be folded into a batch."""
    return isinstance(argument, torch.Tensor) and not argument.is_floating_point()


def _fold(argument: torch.Tensor | None, dim: int | None, axis: int, size: int) -> torch.Tensor | None:
    """The mapped axis in front of the batch, and both as one."""
    if argument is None:
        return None
    if dim is None:
        moved = argument.unsqueeze(axis).expand(*argument.shape[:axis], size, *argument.shape[axis:])
    else:
        moved = argument.movedim(dim, axis)
    return moved.flatten(axis, axis + 1)


def _one_by_one(
    function: Callable[..., Any], size: int, arguments: list[Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    calls = [function(*(a if dim is None else a.select(dim, k) for a, dim, _ in arguments)) for k in range(size)]
    outputs = tuple(None if call[0] is None else torch.stack(call) for call in zip(*calls, strict=True))
    return outputs, tuple(None if out is None else 0 for out in outputs)
