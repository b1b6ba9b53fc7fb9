"""What torch.compile builds into a graph instead of tracing it. Importing this imports the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.assume_constant_result
def constant(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), computed while a graph is made and built into it."""
    return function(*args)


@torch.compiler.disable(reason="triton_lstm runs packed rows, and what torch.func transforms, outside of a graph")
def eagerly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Breaks the graph: for packed rows, whose number depends on the data, and for what torch.func transforms, where an
    operator of torch.library has no gradient.

    Raises RuntimeError in an export, which has no place outside.
    """
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "packed rows, lengths= and torch.func cannot be exported: export padded input without lengths"
        )
    return function(*args, **kwargs)


@torch.compiler.disable(reason="record_gradients hears no call inside torch.compile: record the original model")
def refuse_recording() -> None:
    """Raises RuntimeError: a graph that is made inside a record_gradients block would hear nothing."""
    raise RuntimeError(
        "record_gradients hears no call inside torch.compile: a graph has no place for what is recorded. Record the "
        "model as it was before torch.compile, or call what is compiled outside of the block"
    )
