"""The configuration of a training run: typed, validated, and the same in Python, in a file and as flags."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from triton_lstm.settings import LARGEST, SEEDS, dtype_name

LAYERS = 1000  # their limit
RATE = 1e30  # the largest learning rate: ten times as much has to fit float32

Name = Annotated[str, Field(min_length=1)]
Size = Annotated[int, Field(ge=1, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Share = Annotated[float, Field(ge=0, lt=1)]
Layers = Annotated[int, Field(ge=1, le=LAYERS)]
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
Rate = Annotated[float, Field(gt=0, le=RATE)]
NotNegative = Annotated[float, Field(ge=0, le=RATE)]
Dtype = Annotated[Literal["fp16", "bf16", "tf32", "fp32", "fp64"], BeforeValidator(dtype_name)]
# YAML reads a bare `off` as False
Clip = Annotated[
    Rate | None, BeforeValidator(lambda value: None if str(value).lower() in ("off", "none", "false") else value)
]

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Data:
    """The text, and how batches are made of it.

    Args:
        text: files and folders; without any, the sources of Python's standard library.
        tokenizer: a file of the `tokenizers` package; without one, every byte is a token.
        separator: what separates documents inside of a file; without one, every file is a document.
        held_out: the share of the text, in whole documents, that is held out for validation.
        batches: "stream" cuts the text into contiguous streams, and every batch continues where the last one ended,
            with the states carried over; "windows" starts anywhere, from a state of zeros.
        reset: whether states begin anew where a document begins.
        batch: sequences in a batch, in all processes together; 64 without a GPU.
        seq_len: tokens of a sequence in one batch, through which gradients flow; 12 without a GPU.
        workers: processes that prepare batches; 0 prepares them in between.
        cache: the folder of token files; without one, the platform's cache folder.
    """

    text: tuple[Name, ...] = ()
    tokenizer: Name | None = None
    separator: Name | None = None
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    batches: Literal["stream", "windows"] = "stream"
    reset: bool = True
    batch: Size = 64
    seq_len: Size = 256
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    cache: Name | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    """An embedding, an LSTM and a linear layer.

    Args:
        hidden: hidden units; 64 without a GPU.
        layers: LSTM layers; 1 without a GPU.
        embed: width of the embedding; 32 without a GPU.
        dropout: probability, between LSTM layers.
        recompute: saves memory: the backward pass computes the gates again.
    """

    hidden: Size = 1024
    layers: Layers = 2
    embed: Size = 512
    dropout: Share = 0.0
    recompute: bool = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Optimizer:
    """AdamW, its schedule, and what a step consists of.

    Args:
        steps: the last step; 256 without a GPU.
        lr: peak learning rate; 0.015 without a GPU.
        warmup: steps of linear warm-up; 64 without a GPU.
        schedule: what follows the warm-up: "cosine" decays until the last step, "constant" does not.
        lr_end: the learning rate at the end of the cosine, as a share of the peak.
        weight_decay: of matrices; biases and the embedding have none.
        betas: of the running averages; 0.8 and 0.95 without a GPU.
        eps: added to the denominator; 1e-5 without a GPU.
        clip: the largest norm of all gradients together, or "off".
        accumulate: batches whose gradients one step adds up.
    """

    steps: Size = 1000
    lr: Rate = 1e-3
    warmup: Count = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    lr_end: Share = 0.1
    weight_decay: NotNegative = 0.01
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Rate = 1e-8
    clip: Clip = 1.0
    accumulate: Size = 1

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * (self.lr_end + (1 - self.lr_end) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Execution:
    """How it is computed.

    Args:
        device: "cuda" or "cpu"; without one, the GPU if there is one.
        dtype: "bf16" and "fp16" are autocast, the latter with a scaled loss; "tf32" and "fp32" are float32 with TF32
            allowed or not; "fp32" without a GPU.
        compile: `torch.compile` of the model.
        cuda_graphs: forward and backward pass as CUDA graphs.
        deterministic: only deterministic algorithms of PyTorch.
        seed: of weights, batches, dropout and samples.
        strategy: what each of several processes has of the model: "ddp" a copy, "fsdp" a shard, for models that do not
            fit. One process without torchrun has all of it.
        timeout: seconds that processes wait for each other.
    """

    device: Literal["cpu", "cuda"] | None = None
    dtype: Dtype = "bf16"
    compile: bool = False
    cuda_graphs: bool = False
    deterministic: bool = False
    seed: Seed = 0
    strategy: Literal["ddp", "fsdp"] = "ddp"
    timeout: Annotated[int, Field(ge=1, le=86400)] = 600


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Output:
    """What is shown and kept.

    Args:
        log_every: steps between two rows of metrics.csv; 1 without a GPU.
        validate_every: steps between two validations on all held-out text, besides the one at the end; 0 for none.
        save_every: steps between two checkpoints, besides the one at the end.
        keep: how many of the last checkpoints are kept, besides the best one.
        sample: tokens of the text that the model writes at every validation.
        tensorboard: also log to TensorBoard.
        wandb: also log to this project of Weights & Biases.
        gradients_every: steps between two records of the gradients in all layers and time steps, in TensorBoard or
            Weights & Biases; 0 for none.
    """

    log_every: Size = 10
    validate_every: Count = 1000
    save_every: Size = 500
    keep: Size = 3
    sample: Size = 120
    tensorboard: bool = False
    wandb: Name | None = None
    gradients_every: Count = 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """Everything that determines a run; saved in its folder and in checkpoints."""

    data: Data = dataclasses.field(default_factory=Data)
    model: Model = dataclasses.field(default_factory=Model)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    execution: Execution = dataclasses.field(default_factory=Execution)
    output: Output = dataclasses.field(default_factory=Output)


# Without a GPU, where the kernels run in Triton's interpreter
ON_CPU: dict[str, dict[str, Any]] = {
    "data": {"seq_len": 12},
    "model": {"hidden": 64, "layers": 1, "embed": 32},
    "optimizer": {"steps": 256, "lr": 1.5e-2, "warmup": 64, "betas": (0.8, 0.95), "eps": 1e-5},
    "execution": {"dtype": "fp32"},
    "output": {"log_every": 1, "save_every": 100, "validate_every": 0},
}

# What a resumed run may change: neither the model nor the order of the data, nor what a step computes
CHANGEABLE = {
    "data": {"text", "tokenizer", "workers", "cache"},
    "model": {"recompute"},
    "optimizer": {"steps"},
    "execution": {"device", "compile", "cuda_graphs", "deterministic", "strategy", "timeout"},
    "output": {field.name for field in dataclasses.fields(Output)},
}


def for_file(config: Config) -> dict[str, Any]:
    """The configuration as --config reads it: a key for every flag; what is None is left out."""
    fields = {name: value for section in dataclasses.asdict(config).values() for name, value in section.items()}
    fields["clip"] = "off" if fields["clip"] is None else fields["clip"]
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items() if value is not None
    }


def differences(before: Config, after: Config) -> Iterator[tuple[str, str, Any, Any]]:
    """Yields section, field, and both values of every field that differs."""
    for section, values in dataclasses.asdict(after).items():
        old = dataclasses.asdict(before)[section]
        yield from ((section, name, old[name], value) for name, value in values.items() if value != old[name])
