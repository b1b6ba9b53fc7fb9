"""Moved to triton_lstm.operator.library."""

import warnings

from triton_lstm.operator.library import fresh, layer

warnings.warn(
    "triton_lstm.ops is deprecated: import triton_lstm.operator.library instead", DeprecationWarning, stacklevel=2
)
__all__ = ["fresh", "layer"]
