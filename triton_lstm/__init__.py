"""triton_lstm: the LSTM of PyTorch as persistent Triton kernels."""

from triton_lstm.system.early_interrupt import exit_quietly_on_interrupt

exit_quietly_on_interrupt()  # before the import of PyTorch, which takes a while

from triton_lstm.convert import Report, convert
from triton_lstm.core.call import LayerStates, PackedLayerStates
from triton_lstm.explain import explain
from triton_lstm.functional import lstm
from triton_lstm.gradients.layer import Gates, LayerGradients
from triton_lstm.gradients.record import record_gradients
from triton_lstm.gradients.results import Gradients
from triton_lstm.gradients.statistics import StepStatistics
from triton_lstm.module import LSTM
from triton_lstm.system.version import __version__ as __version__

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
