"""triton_lstm: the LSTM of PyTorch as persistent Triton kernels."""

from triton_lstm.quiet_start import leave_quietly

leave_quietly()  # before PyTorch, whose import takes a while

from triton_lstm.call import LayerStates, PackedLayerStates
from triton_lstm.convert import Report, convert
from triton_lstm.explain import explain
from triton_lstm.functional import lstm
from triton_lstm.gradients import Gradients, record_gradients
from triton_lstm.layer_gradients import Gates, LayerGradients
from triton_lstm.module import LSTM
from triton_lstm.statistics import StepStatistics

__version__ = "0.1.0"
__all__ = [
    "LSTM",
    "Gates",
    "Gradients",
    "LayerGradients",
    "LayerStates",
    "PackedLayerStates",
    "Report",
    "StepStatistics",
    "convert",
    "explain",
    "lstm",
    "record_gradients",
]
