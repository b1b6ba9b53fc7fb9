"""triton_lstm: the LSTM of PyTorch as persistent Triton kernels."""

from triton_lstm.signals import leave_quietly

leave_quietly()  # before PyTorch, whose import takes a while

from triton_lstm.convert import convert
from triton_lstm.explain import explain
from triton_lstm.functional import lstm
from triton_lstm.gradients import record_gradients
from triton_lstm.module import LSTM

__version__ = "0.1.0"
__all__ = ["LSTM", "convert", "explain", "lstm", "record_gradients"]
