"""record_gradients: every gradient inside the LSTMs of a model, to inspect, tabulate and plot."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Literal

from torch import nn

from triton_lstm.gradients.recorder import Recording
from triton_lstm.gradients.results import Gradients
from triton_lstm.module import LSTM


@contextlib.contextmanager
def record_gradients(
    model: nn.Module, *, reduce: Literal["norm"] | None = None, steps: int | None = None
) -> Iterator[Gradients]:
    r"""Context manager that records the gradients inside every triton_lstm.LSTM of a model.

    The forward and backward pass both have to run inside the block. With pre-activations :math:`a_t`, loss :math:`L`
    and row vectors, it records for every time step

    .. math::
        \frac{dL}{dx_t} = \frac{dL}{da_t} W_{ih}, \quad
        \frac{dL}{dh_t} = \frac{\partial L}{\partial y_t} + \frac{dL}{da_{t+1}} W_{hh}, \quad
        \frac{dL}{dc_t}, \quad \frac{dL}{da_t}, \quad \frac{\partial L}{\partial y_t},

    and :math:`dL/dh_0` and :math:`dL/dc_0`. The model's results and gradients are bit-identical with and without
    recording, but for calls with cu_seqlens on the CPU: inside of the block they run as resets, so that what is
    recorded has the stream's steps, which changes the last bits, and the random numbers of dropout. All recorded
    tensors are kept until `grads` is deleted: several of the output's size per layer and call.

    Args:
        model: an nn.Module that contains triton_lstm.LSTM modules, or is one; may be wrapped in
            DistributedDataParallel.
        reduce: "norm" keeps only per-step statistics, in memory that depends on T alone. Default: None.
        steps: the largest number of time steps for which every element is kept; longer calls keep statistics only.
            Default: None, no limit.

    Returns:
        A context manager that yields `Gradients`, with one `LayerGradients` per module, call, layer, direction and
        backward pass. Shapes and dtypes are documented there.

    Raises:
        TypeError: if `model` is not an nn.Module.
        ValueError: if `model` contains no triton_lstm.LSTM, or `reduce` or `steps` is invalid.
        RuntimeError: if the model was compiled with torch.compile, or is called under torch.compile or a torch.func
            transform.

    Example::

        import torch
        import triton_lstm

        lstm = triton_lstm.LSTM(8, 16)
        with triton_lstm.record_gradients(lstm) as grads:
            output, _ = lstm(torch.randn(5, 2, 8))
            output[-1].sum().backward()
        print(grads.summary())
        print(grads.hidden.shape)  # (5, 2, 16): dL/dh at every step
    """
    modules = _lstms(model)
    if reduce not in (None, "norm"):
        raise ValueError(f'reduce must be "norm" or None, got {reduce!r}')
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 0):
        raise ValueError(f"steps must be a non-negative integer, got {steps!r}")
    recording = Recording(list(modules), -1 if reduce else sys.maxsize if steps is None else steps)
    try:
        for name, module in modules.items():
            module._recordings = (*module._recordings, (recording, name))
        yield Gradients(recording)
    finally:
        for module in modules.values():
            rest = tuple(pair for pair in module._recordings if pair[0] is not recording)
            if rest:
                module._recordings = rest
            else:
                module.__dict__.pop("_recordings", None)
        recording.close()


def _lstms(model: nn.Module) -> dict[str, LSTM]:
    """The model's LSTMs by name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"record_gradients expects a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise RuntimeError(
                f"record_gradients cannot record calls inside torch.compile, and {name or 'the model'} is compiled. "
                "Record the original model (its _orig_mod)"
            )
    found = {
        name or type(module).__name__: module for name, module in model.named_modules() if isinstance(module, LSTM)
    }
    if not found:
        theirs = [name or "the model" for name, module in model.named_modules() if isinstance(module, nn.LSTM)]
        advice = f"; {', '.join(theirs)} is torch.nn.LSTM: call triton_lstm.convert(model) first" if theirs else ""
        raise ValueError(f"this {type(model).__name__} contains no triton_lstm.LSTM{advice}")
    return found
