"""nn.LSTM on the same batches, to compare every loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from triton_lstm.settings import UsageError
from triton_lstm.training.batches import Batch
from triton_lstm.training.config import Config
from triton_lstm.training.model import build, state_dtype
from triton_lstm.training.trainer import Trainer


class ResettingLSTM(nn.LSTM):
    """nn.LSTM where states begin anew: one call for each piece of time between resets.

    Args:
        dtype: in which it computes, whatever autocast says: PyTorch's own rules differ between CPU and GPU.
    """

    def __init__(self, *args: Any, compute: torch.dtype, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compute = compute

    def forward(  # type: ignore[override] # one argument more
        self, input: torch.Tensor, hx: Any = None, resets: torch.Tensor | None = None
    ) -> Any:
        """input (T, B, I), hx as nn.LSTM's, resets (T, B): the state before this step is zero."""
        weights = [weight.to(self.compute) for weight in self.parameters()]
        shape = (self.num_layers, input.shape[1], self.hidden_size)
        state = tuple(s.to(self.compute) for s in hx or [input.new_zeros(shape) for _ in range(2)])
        outputs = []
        with torch.autocast(input.device.type, enabled=False):
            for begin, end in _pieces(resets, len(input)):
                if resets is not None:
                    state = tuple(s.masked_fill(resets[begin].unsqueeze(1), 0) for s in state)
                x = input[begin:end].to(self.compute)
                y, *state = torch.lstm(  # type: ignore[assignment]
                    x, state, weights, True, self.num_layers, self.dropout, self.training, False, False
                )
                outputs.append(y)
        return torch.cat(outputs), tuple(state)


def _pieces(resets: torch.Tensor | None, steps: int) -> Iterator[tuple[int, int]]:
    """The pieces of time in which no row is reset after the first step."""
    at = [] if resets is None else resets.any(1).nonzero().flatten().tolist()
    begins = [0, *(t for t in at if t)]
    yield from zip(begins, [*begins[1:], steps], strict=True)


class Comparison:
    """nn.LSTM in the dtype of `config`, and in float64, trained on the batches that `step` is given.

    Args:
        config: of the run that it is compared with.
        tokens: the size of the vocabulary.
    """

    def __init__(self, config: Config, tokens: int, device: torch.device) -> None:
        self.ours: list[float] = []
        self.losses: list[list[float]] = [[], []]
        self.trainers = []
        for dtype in (config.execution.dtype, "fp64"):
            eager = dataclasses.replace(config.execution, dtype=dtype, compile=False, cuda_graphs=False)
            own = dataclasses.replace(config, execution=eager)
            self.trainers.append(
                Trainer(build(own, tokens, device, ResettingLSTM, compute=state_dtype(own)), own, device)
            )

    def step(self, batches: Sequence[Batch], loss: float) -> None:
        """Trains on the micro-batches of a step, in which our loss was `loss`."""
        self.ours.append(loss)
        for trainer, losses in zip(self.trainers, self.losses, strict=True):
            losses.append(trainer.train(batches)[0].item())

    def rows(self) -> list[dict[str, Any]]:
        """One row for every step; see `compare`."""
        return compare(self.ours, *self.losses)


def check_comparable(config: Config, device: torch.device) -> None:
    """Raises UsageError if nn.LSTM cannot run this configuration with the same random numbers."""
    if not config.model.dropout or config.model.layers == 1:
        return
    if device.type == "cuda":
        raise UsageError(
            "--compare cannot have --dropout on a GPU, where cuDNN draws other random numbers. Omit one of them"
        )
    if config.execution.compile:
        raise UsageError(
            "--compare cannot have --dropout and --compile, which draws other random numbers. Omit one of them"
        )
    if config.data.reset:
        raise UsageError(
            "--compare cannot have --dropout where states begin anew, since nn.LSTM draws its random numbers piece by "
            "piece there. Add --no-reset, or omit one of them"
        )


def compare(ours: list[float], theirs: list[float], exact: list[float]) -> list[dict[str, Any]]:
    """One row per step. allowed: twice nn.LSTM's largest deviation so far from nn.LSTM in float64, plus 1e-4 of the
    loss."""
    rows, spread = [], 0.0
    for step, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        if math.isfinite(b - c):
            spread = max(spread, abs(b - c))
        allowed = 2 * spread + 1e-4 * abs(b)
        ok = abs(a - b) <= allowed or (math.isnan(a) and math.isnan(b))
        rows.append(
            {
                "step": step,
                "triton_lstm": a,
                "nn.LSTM": b,
                "difference": abs(a - b),
                "allowed": allowed,
                "ok": ok,
            }
        )
    return rows
