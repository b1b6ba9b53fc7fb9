"""The Triton kernels and their launchers. Import this as `triton_lstm.kernels`, and only once triton is needed."""

from triton.runtime import JITFunction

from triton_lstm.kernels.backward import lstm_backward, lstm_backward_kernel
from triton_lstm.kernels.forward import lstm_forward, lstm_forward_kernel
from triton_lstm.kernels.launch import accumulator, device_facts

# Fixed at import by TRITON_INTERPRET
INTERPRETED = not isinstance(lstm_forward_kernel, JITFunction)

if INTERPRETED:
    from triton_lstm.kernels.interpreter import repair_bfloat16

    repair_bfloat16()

__all__ = [
    "INTERPRETED",
    "accumulator",
    "device_facts",
    "lstm_backward",
    "lstm_backward_kernel",
    "lstm_forward",
    "lstm_forward_kernel",
]
