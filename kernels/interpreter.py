"""Makes Triton's interpreter compute in bfloat16 as a GPU does.

As shipped (seen up to Triton 3.9) its bfloat16 tensors are bit patterns in uint16: `tl.dot` multiplies the patterns,
and a cast from float32 drops the low bits instead of rounding to nearest even.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widen(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _round(data: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


def repair_bfloat16() -> None:
    """Replaces the two faulty methods of the interpreter; calling it again changes nothing."""
    if getattr(InterpreterBuilder, "_triton_lstm_repaired", False):
        return
    shipped_dot, shipped_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return shipped_dot(self, _widen(a), _widen(b), *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if target == tl.bfloat16 and source == tl.float32:
            return TensorHandle(_round(src.data), tl.bfloat16)
        if source == tl.bfloat16 and target == tl.float32:
            return _widen(src)
        return shipped_cast(self, src, dst_type)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder._triton_lstm_repaired = True
