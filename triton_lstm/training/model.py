"""A language model (embedding, LSTM, linear layer), its loss on held-out text, and samples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from triton_lstm.settings import DTYPES
from triton_lstm.system.memory import memory_of
from triton_lstm.system.terminal import Bar
from triton_lstm.training.batches import HeldOut
from triton_lstm.training.config import Config
from triton_lstm.training.text.vocabulary import Vocabulary

TEMPERATURE = 0.7  # of samples
State = tuple[torch.Tensor, torch.Tensor]


class LanguageModel(nn.Module):
    """Maps tokens to logits of the next token.

    Args:
        lstm: a module that is called as `lstm(x, (h, c), resets=resets)`, with inputs of `embed` features.
        tokens: the size of the vocabulary.
        embed: the width of the embedding.
    """

    def __init__(self, lstm: nn.RNNBase, tokens: int, embed: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, embed)
        self.lstm = lstm
        self.head = nn.Linear(lstm.hidden_size, tokens)

    def forward(
        self, tokens: torch.Tensor, state: State | None = None, resets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, State]:
        """tokens, resets (T, B) -> logits (T, B, vocabulary) and the LSTM's state, each (layers, B, H)."""
        y, state = self.lstm(self.embed(tokens), state, resets=resets)
        return self.head(y), state


class Loss(nn.Module):
    """The mean cross entropy of a batch in nats, and the state it ends with: what is compiled or captured."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs: torch.Tensor, targets: torch.Tensor, h: torch.Tensor, c: torch.Tensor, *resets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """inputs, targets, resets (T, B); h, c (layers, B, H) -> a scalar, h, c."""
        logits, (h, c) = self.model(inputs, (h, c), *resets)
        return F.cross_entropy(logits.flatten(0, 1).to(_loss_dtype(logits)), targets.flatten()), h, c


def _loss_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def build(config: Config, tokens: int, device: torch.device, lstm_class: type, **kwargs: Any) -> LanguageModel:
    """The model of `config` for `tokens` token ids. The same seed gives the same weights for every LSTM class.

    kwargs: further arguments of lstm_class.
    """
    torch.manual_seed(config.execution.seed)
    sizes = config.model
    lstm = lstm_class(sizes.embed, sizes.hidden, sizes.layers, dropout=sizes.dropout, **kwargs)
    model = LanguageModel(lstm, tokens, sizes.embed).to(device)
    return model.double() if config.execution.dtype == "fp64" else model


def check_memory(config: Config, tokens: int, device: torch.device, shards: int = 1) -> None:
    """Raises MemoryError if the device cannot hold the weights, their gradients and their two moments.

    The system may promise more memory than there is, and kill the process that uses it.

    shards: processes that each have a part of them.
    """
    with torch.device("meta"):  # allocates nothing
        model = build(config, tokens, torch.device("meta"), nn.LSTM)
    needed, there = 4 * sum(weight.nbytes for weight in model.parameters()) / shards, memory_of(device)
    if needed > there:
        raise MemoryError(f"training needs {needed / 1e9:,.1f} GB or more, {device} has {there / 1e9:,.1f} GB")


def state_dtype(config: Config) -> torch.dtype:
    """The dtype of the LSTM's states: under autocast, the one that it computes in."""
    return DTYPES[config.execution.dtype]


@contextlib.contextmanager
def autocast(config: Config, device: torch.device) -> Iterator[None]:
    """The context in which the model runs; without a cache of cast weights for CUDA graphs, which cannot have one."""
    dtype = state_dtype(config)
    lower = dtype in (torch.bfloat16, torch.float16)
    graphs = config.execution.cuda_graphs
    onednn: Any = torch.backends.mkldnn
    before = onednn.enabled
    if device.type == "cpu" and dtype == torch.float16:  # autocast picks oneDNN's LSTM, which most CPUs do not have
        onednn.enabled = False
    try:
        with torch.autocast(device.type, dtype if lower else None, enabled=lower, cache_enabled=not graphs):
            yield
    finally:
        onednn.enabled = before


def zero_state(config: Config, device: torch.device, rows: int) -> State:
    """h and c before the first step, each (layers, rows, H)."""
    shape = (config.model.layers, rows, config.model.hidden)
    h, c = (torch.zeros(shape, dtype=state_dtype(config), device=device) for _ in range(2))
    return h, c


@contextlib.contextmanager
def evaluating(model: LanguageModel, device: torch.device) -> Iterator[None]:
    """Without dropout and gradients; on the CPU with PyTorch's own LSTM: the interpreter takes as long as hundreds of
    training steps."""
    training, backend = model.training, getattr(model.lstm, "backend", None)
    model.eval()
    if device.type == "cpu" and hasattr(model.lstm, "backend"):
        model.lstm.backend = "torch"
    try:
        with torch.no_grad():
            yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # otherwise some keep gathered weights for a backward pass
        model.train(training)
        if hasattr(model.lstm, "backend"):
            model.lstm.backend = backend


def held_out_loss(
    model: LanguageModel,
    batches: HeldOut,
    config: Config,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, int] | None:
    """The sum of the loss over all targets, in nats, and the number of targets; None as soon as `stop` says so.

    With `batches="stream"` states are carried from batch to batch, as in training.
    """
    total, count, state = torch.zeros((), dtype=torch.float64, device=device), 0, None
    with evaluating(model, device), autocast(config, device):
        for batch in Bar(batches, desc="held out", unit="batch", delay=5, leave=False):
            if stop():
                return None
            on_device = batch.to(device)
            logits, state = model(on_device.inputs, state, on_device.resets)
            if config.data.batches == "windows":
                state = None
            flat = logits.flatten(0, 1)
            total += F.cross_entropy(flat.to(_loss_dtype(flat)), on_device.targets.flatten(), reduction="sum")
            count += int((batch.targets >= 0).sum())
    return total.item(), count


def sample(model: LanguageModel, vocabulary: Vocabulary, length: int, config: Config, device: torch.device) -> str:
    """A text of `length` tokens, on one line, sampled from the beginning of a document."""
    generator = torch.Generator().manual_seed(config.execution.seed)
    token = torch.full((1, 1), vocabulary.end, device=device)
    state, sampled = None, []
    with evaluating(model, device), autocast(config, device):
        for _ in range(length):
            logits, state = model(token, state)
            probabilities = (logits[0, 0].double().cpu() / TEMPERATURE).softmax(0)
            if not probabilities.isfinite().all():
                return "none: the model's logits are not finite"
            sampled.append(int(torch.multinomial(probabilities, 1, generator=generator)))
            token.fill_(sampled[-1])
    return vocabulary.decode(sampled).encode("unicode_escape").decode()
