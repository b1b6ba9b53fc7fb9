"""The Triton kernels and their launchers. Import this as `triton_lstm.kernels`, and only once triton is needed."""

import triton.language as tl
from triton.runtime import JITFunction

from triton_lstm.kernels.backward import lstm_backward, lstm_backward_kernel
from triton_lstm.kernels.forward import lstm_forward, lstm_forward_kernel
from triton_lstm.kernels.launch import accumulator, device_facts

if isinstance(lstm_forward_kernel, JITFunction) != isinstance(tl.cdiv, JITFunction):
    raise ImportError("TRITON_INTERPRET changed after triton was imported; set it before, or not at all")
if not isinstance(lstm_forward_kernel, JITFunction):
    from triton_lstm.kernels.interpreter import repair_bfloat16

    repair_bfloat16()

__all__ = [
    "accumulator",
    "device_facts",
    "lstm_backward",
    "lstm_backward_kernel",
    "lstm_forward",
    "lstm_forward_kernel",
]
