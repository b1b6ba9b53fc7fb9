"""Moved to triton_lstm.planning.devices."""

import warnings

from triton_lstm.planning.devices import GPUS, Device, known_gpu

warnings.warn(
    "triton_lstm.devices is deprecated: import triton_lstm.planning.devices instead", DeprecationWarning, stacklevel=2
)
__all__ = ["GPUS", "Device", "known_gpu"]
