"""A byte-level language model (embedding, LSTM stack, head), its loss and samples."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from triton_lstm.settings import DTYPES
from triton_lstm.system.terminal import Bar
from triton_lstm.training.config import Config

EVALUATED = 8192  # bytes per evaluation batch, or a training step's if that is more


class LanguageModel(nn.Module):
    """Maps bytes to logits of the next byte. The LSTM computes in `dtype`; its weights are stored in their own."""

    def __init__(self, lstm: nn.RNNBase, embed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.embed = nn.Embedding(256, embed)
        self.lstm = lstm
        self.head = nn.Linear(lstm.hidden_size, 256)

    def forward(self, tokens: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        """tokens (T, B) -> logits (T, B, 256) and the LSTM's state."""
        weights = {name: weight.to(self.dtype) for name, weight in self.lstm.named_parameters()}
        x = self.embed(tokens).to(self.dtype)
        y, state = torch.func.functional_call(self.lstm, weights, (x, state))
        return self.head(y.to(self.head.weight.dtype)), state


def build(
    config: Config, device: torch.device, lstm_class: type, dtype: str | None = None, **kwargs: Any
) -> LanguageModel:
    """The model of `config` on `device`. The same seed gives the same weights for every LSTM class."""
    torch.manual_seed(config.seed)
    compute = DTYPES[dtype or config.dtype]
    lstm = lstm_class(config.embed, config.hidden, config.layers, **kwargs)
    model = LanguageModel(lstm, config.embed, compute).to(device)
    return model.double() if compute == torch.float64 else model


def loss_of(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over every next byte, in nats."""
    logits, _ = model(tokens[:-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten())


@torch.no_grad()
def bits_per_byte(model: LanguageModel, held_out: torch.Tensor, config: Config, device: torch.device) -> float:
    """The mean loss over every byte of the held-out text except the first, in consecutive windows of seq_len bytes.

    On the CPU this uses PyTorch's own LSTM: the interpreter would take as long as hundreds of training steps.
    """
    if device.type == "cpu":
        model = copy.deepcopy(model)
        model.lstm.backend = "torch"
    total, count = 0.0, len(held_out) - 1
    whole = count // config.seq_len
    together = max(config.batch, EVALUATED // config.seq_len)
    windows = held_out[: whole * config.seq_len + 1].unfold(0, config.seq_len + 1, config.seq_len)
    rest = held_out[whole * config.seq_len :].unsqueeze(0)
    batches = [*windows.split(together), *([rest] if rest.shape[1] > 1 else [])]
    for batch in Bar(batches, desc="held out", unit="batch", delay=5, leave=False):
        tokens = batch.t().long().to(device)
        total += loss_of(model, tokens).item() * tokens[1:].numel()
    return total / count / math.log(2)


@torch.no_grad()
def sample(model: LanguageModel, length: int, config: Config, device: torch.device) -> str:
    """`length` bytes sampled at temperature 0.7, starting from a line break."""
    generator = torch.Generator().manual_seed(config.seed)
    token = torch.full((1, 1), ord("\n"), device=device)
    state, sampled = None, []
    for _ in range(length):
        logits, state = model(token, state)
        probabilities = (logits[0, 0].float().cpu() / 0.7).softmax(0)
        if not probabilities.isfinite().all():
            return "none: the model's logits are not finite"
        sampled.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        token.fill_(sampled[-1])
    return bytes(sampled).decode("utf-8", "replace").encode("unicode_escape").decode()
