"""Checks of the arguments of a call."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

TENSORS_ONLY = "params must contain tensors only; without biases, omit them and pass has_biases=False"
# weight_ih, weight_hh, bias_ih, bias_hh, weight_hr of one layer and direction; each of the last three may be None
Group = list[Any]


def by_layer(params: Sequence[torch.Tensor], groups: int, has_biases: bool) -> list[Group]:
    """nn.LSTM's list of weights, split into one Group per layer and direction."""
    if groups < 1:
        raise ValueError("num_layers must be greater than zero")
    for param in params:
        if param is None:
            raise TypeError(TENSORS_ONLY)
    plain = 4 if has_biases else 2
    size, rest = divmod(len(params), groups)
    if rest or size not in (plain, plain + 1):
        raise ValueError(
            f"params must contain {plain * groups} tensors, or {(plain + 1) * groups} with a projection "
            f"({groups} layers and directions, has_biases={has_biases}), got {len(params)}"
        )
    no_biases = [] if has_biases else [None, None]
    no_projection = [] if size > plain else [None]
    starts = range(0, len(params), size)
    return [[*params[k : k + 2], *no_biases, *params[k + 2 : k + size], *no_projection] for k in starts]


def check_shapes(
    input: torch.Tensor,
    weights: list[Group],
    directions: int,
    batch_first: bool,
    batch_sizes: torch.Tensor | None,
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Raises unless the shapes, devices and dtypes of input and weights match; returns the shapes of h0 and c0."""
    dims = 3 if batch_sizes is None else 2
    if input.dim() != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
    if batch_sizes is not None:
        _check_batch_sizes(batch_sizes, input.shape[0])
        steps, batch = batch_sizes.shape[0], int(batch_sizes[0])
    else:
        batch, steps = (input.shape[0], input.shape[1]) if batch_first else (input.shape[1], input.shape[0])
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    _, w_hh, *_, w_hr = weights[0]
    if w_hh.dim() != 2 or (w_hr is not None and w_hr.dim() != 2):
        raise ValueError(f"weight_hh and weight_hr must have 2 dimensions, got {w_hh.dim()} in weight_hh")
    hidden = w_hh.shape[0] // 4
    out = hidden if w_hr is None else w_hr.shape[0]
    for k, group in enumerate(weights):
        width = input.shape[-1] if k < directions else directions * out
        shapes = [(4 * hidden, width), (4 * hidden, out), (4 * hidden,), (4 * hidden,), (out, hidden)]
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
        for name, tensor, shape in zip(names, group, shapes, strict=True):
            if tensor is None:
                continue
            if tensor.shape != shape:
                raise ValueError(f"{name} of layer {k // directions} must be {shape}, got {tuple(tensor.shape)}")
            if tensor.device != input.device:
                raise RuntimeError(
                    "Input and parameter tensors are not at the same device, found input tensor at "
                    f"{input.device} and parameter tensor at {tensor.device}"
                )
            if tensor.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
                raise ValueError(
                    f"RNN input dtype ({input.dtype}) does not match weight dtype ({tensor.dtype}). Convert input: "
                    f"input.to({tensor.dtype}), or convert model: model.to({input.dtype})"
                )
    return (len(weights), batch, out), (len(weights), batch, hidden)


def _check_batch_sizes(batch_sizes: torch.Tensor, rows: int) -> None:
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise RuntimeError("batch_sizes must be a 1-D int64 tensor on the CPU, as in a PackedSequence")
    sizes = batch_sizes.tolist()
    if not sizes:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if sizes != sorted(sizes, reverse=True) or sizes[-1] < 1 or sum(sizes) != rows:
        raise RuntimeError(f"batch_sizes must be positive, non-increasing, and sum to the {rows} rows of the input")


def check_pair(hx: Any) -> None:
    """Raises unless hx is (h0, c0): TypeError where torch.lstm raises one, else RuntimeError."""
    expected = "hx must be a tuple or list of two tensors, h0 and c0"
    if not isinstance(hx, (tuple, list)):
        got = f"one of shape {tuple(hx.shape)}: unbind it" if isinstance(hx, torch.Tensor) else type(hx).__name__
        raise TypeError(f"{expected}, got {got}")
    if len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")
    for k, state in enumerate(hx):
        if not isinstance(state, torch.Tensor):
            raise TypeError(f"{expected}, got {type(state).__name__} as hx[{k}]")


def check_states(
    input: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor, h_shape: tuple[int, ...], c_shape: tuple[int, ...]
) -> None:
    """Raises unless h0 and c0 have these shapes and the input's device and dtype."""
    for k, (state, shape) in enumerate([(h0, h_shape), (c0, c_shape)]):
        if state.shape != shape:
            raise RuntimeError(f"Expected hidden[{k}] size {shape}, got {list(state.shape)}")
        if state.device != input.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, found input tensor at "
                f"{input.device} and hidden tensor at {state.device}"
            )
        if state.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
            raise ValueError(f"hx[{k}] has dtype {state.dtype}, the input {input.dtype}. Convert one of them.")


def check_lengths(lengths: Any, batch: int, steps: int) -> torch.Tensor:
    """The lengths of a padded batch as (B,) int64 on the CPU.

    Raises ValueError unless they are `batch` integers from 1 to `steps`.
    """
    try:
        lengths = torch.as_tensor(lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"lengths must be {batch} integers, one per sequence: {error}") from error
    if lengths.numel() == 0:  # an empty list becomes floats
        lengths = lengths.long()
    if lengths.shape != (batch,) or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(
            f"lengths must be {batch} integers, one per sequence, got {lengths.dtype} {tuple(lengths.shape)}"
        )
    lengths = lengths.long()
    if batch and not 1 <= int(lengths.min()) <= int(lengths.max()) <= steps:
        raise ValueError(f"lengths must be between 1 and the input's {steps} steps, got {lengths.tolist()}")
    return lengths


def check_resets(resets: Any, input: torch.Tensor) -> torch.Tensor:
    """Raises unless resets are a bool tensor with one value for each row of `input`, and on its device."""
    if not isinstance(resets, torch.Tensor):
        advice = (
            "its data" if type(resets).__name__ == "PackedSequence" else "torch.as_tensor(resets, dtype=torch.bool)"
        )
        raise TypeError(f"resets must be a bool tensor, got {type(resets).__name__}: pass {advice}")
    if resets.dtype != torch.bool:
        raise ValueError(f"resets must be a bool tensor, got {resets.dtype}: pass resets.bool()")
    if resets.shape != input.shape[:-1]:
        advice = ""
        if input.dim() == 3 and resets.shape == (input.shape[1], input.shape[0]):
            advice = ": pass resets.t(), (B, T) with batch_first and (T, B) without"
        elif input.dim() == 2 and resets.dim() == 2:
            advice = "; of a PackedSequence they are its rows: pack_padded_sequence(resets, lengths, ...).data"
        raise ValueError(
            f"resets must have the input's shape without its features, {tuple(input.shape[:-1])}, got "
            f"{tuple(resets.shape)}{advice}"
        )
    if resets.device != input.device:
        raise RuntimeError(
            f"Input and resets are not at the same device, found input tensor at {input.device} and resets at "
            f"{resets.device}"
        )
    return resets


def check_cu_seqlens(cu_seqlens: Any, batch: int) -> torch.Tensor:
    """cu_seqlens as a tensor.

    Raises TypeError or ValueError unless they are integers, two at least, for a batch of one sequence.
    """
    expected = "cu_seqlens must be a 1-D tensor of int32 or int64: 0, then where each document ends"
    if not isinstance(cu_seqlens, torch.Tensor):
        try:
            cu_seqlens = torch.tensor(cu_seqlens, dtype=None if len(cu_seqlens) else torch.int32, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{expected}; got {type(cu_seqlens).__name__}: {error}") from None
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{expected}; got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(
            "cu_seqlens goes with one sequence of documents, a batch of 1, which is (T, 1, I), or (1, T, I) with "
            f"batch_first; got a batch of {batch}"
        )
    return cu_seqlens


def check_documents(cu_seqlens: torch.Tensor, steps: int) -> None:
    """Raises ValueError unless cu_seqlens, on the CPU, go from 0 to the input's steps and never back."""
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != steps or values != sorted(values):
        shown = values if len(values) < 10 else [*values[:4], "...", *values[-4:]]
        raise ValueError(f"cu_seqlens must go from 0 to the input's {steps} steps and never back, got {shown}")


def tell_opacus(kind: type) -> None:
    """If opacus is imported, makes its validator and fixer, which dispatch on the class, treat `kind` as nn.LSTM."""
    validator = getattr(sys.modules.get("opacus.validators"), "ModuleValidator", None)
    for known in (getattr(validator, "VALIDATORS", {}), getattr(validator, "FIXERS", {})):
        if torch.nn.LSTM in known:
            known.setdefault(kind, known[torch.nn.LSTM])


def refuse_opacus(hook: Any) -> None:
    """Raises RuntimeError for a hook of opacus' GradSampleModule, which requires a module that returns one tensor and
    would fail in the backward pass."""
    owner = type(getattr(hook, "__self__", hook))
    if owner.__module__.partition(".")[0] == "opacus":
        raise RuntimeError(
            f"opacus' {owner.__name__} cannot compute per-sample gradients of a triton_lstm.LSTM. Create the model "
            "again, apply triton_lstm.convert(model, back=True) and then opacus.validators.ModuleValidator.fix(model), "
            "which replaces it by a DPLSTM, and pass the result to opacus"
        )
