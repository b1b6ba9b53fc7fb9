"""What torch.compile builds into a graph instead of tracing it. Importing this imports the compiler."""

from __future__ import annotations

import torch

from triton_lstm.backend import chosen_backend, no_kernel_for


@torch.compiler.assume_constant_result
def decided(device_type: str, dtype: torch.dtype, backend: str | None) -> tuple[str, str | None]:
    """The chosen backend, and why there is no kernel for these."""
    return chosen_backend(backend), no_kernel_for(device_type, dtype)
