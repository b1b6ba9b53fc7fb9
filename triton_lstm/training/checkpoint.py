"""Checkpoints of `train`: written atomically, and validated when they are read."""

from __future__ import annotations

import dataclasses
import os
import signal
import warnings
import zipfile
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, ConfigDict, Field, InstanceOf, TypeAdapter, ValidationError, with_config
from torch import nn
from typing_extensions import TypedDict

from triton_lstm.settings import LARGEST, UsageError
from triton_lstm.system.atomic_file import atomic_write, sync
from triton_lstm.system.signals import deferred_signals
from triton_lstm.training.config import Config
from triton_lstm.training.model import build, state_dtype

FORMAT = 2
STRICT = ConfigDict(strict=True, extra="forbid")
Number = Annotated[int, Field(ge=0, le=LARGEST)]
Tensors = dict[str, InstanceOf[torch.Tensor]]
NotNegative = Annotated[float, Field(ge=0)]


@with_config(STRICT)
class Best(TypedDict):
    """The validation with the smallest loss, in nats per token."""

    step: Number
    loss: float


@with_config(STRICT)
class Scaler(TypedDict):
    """The scale of the loss, and for how many steps it has been that."""

    scale: NotNegative
    age: Number


@with_config(STRICT)
class Progress(TypedDict):
    """What a run has shown so far.

    seconds: trained. logged, validated: the steps of the last losses in metrics.csv. loss_sum: of the steps since then.
    """

    seconds: NotNegative
    logged: Number
    loss_sum: float
    validated: Number
    best: Best | None


@with_config(STRICT)
class Content(TypedDict):
    """What a checkpoint has.

    digest: of the tokens of all documents. tokens: the size of the vocabulary. The others as in Trainer.state_dict.
    """

    format: Literal[2]
    config: InstanceOf[Config]
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    tokens: Annotated[int, Field(ge=2, le=LARGEST)]
    progress: Progress
    step: Number
    updates: Number
    model: Tensors
    exp_avg: Tensors
    exp_avg_sq: Tensors
    states: list[tuple[InstanceOf[torch.Tensor], InstanceOf[torch.Tensor]]]
    scaler: Scaler | None


def _check_tensors(content: Content) -> Content:
    config = content["config"]
    with torch.device("meta"):  # allocates nothing, whatever the size
        expected = build(config, content["tokens"], torch.device("meta"), nn.LSTM).state_dict()
    for found in (content["model"], content["exp_avg"], content["exp_avg_sq"]):
        if found.keys() != expected.keys() or not all(_alike(found[name], t) for name, t in expected.items()):
            raise ValueError("the tensors do not match the sizes")
    if any((squares < 0).any() for squares in content["exp_avg_sq"].values()):
        raise ValueError("a second moment is negative")
    shape = (config.model.layers, config.data.batch, config.model.hidden)
    state = torch.empty(shape, dtype=state_dtype(config), device="meta")
    if len(content["states"]) != config.optimizer.accumulate or not all(
        _alike(tensor, state) for pair in content["states"] for tensor in pair
    ):
        raise ValueError("the states do not match the sizes")
    return content


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `a` has data, and the shape, dtype and layout of `b`."""
    return not a.is_meta and (a.shape, a.dtype, a.layout) == (b.shape, b.dtype, b.layout)


CONFIG = TypeAdapter(Config)
CHECKED: TypeAdapter[Content] = TypeAdapter(Annotated[Content, AfterValidator(_check_tensors)])


def _validated(found: Any) -> Content:
    if isinstance(found, dict) and found.get("format") == FORMAT and "config" in found:
        found = found | {"config": CONFIG.validate_python(found["config"])}  # not strict: lists become tuples
    return CHECKED.validate_python(found)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes to a temporary file and renames it, so that a crash leaves the old checkpoint intact. Signals are deferred
    until it is done.

    Raises UsageError if it cannot be written.
    """
    with deferred_signals() as received:
        try:
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                torch.save({"format": FORMAT} | content | {"config": dataclasses.asdict(content["config"])}, file)
                file.flush()
                os.fsync(file.fileno())
            sync(path.parent)
        except (OSError, RuntimeError) as error:  # torch.save closes its archive with a RuntimeError on a full disk
            raise UsageError(f"cannot write the checkpoint {path}: {_reason(error)}") from None
    if received:  # pass it on to the outer handler
        signal.raise_signal(received[0])


def load_checkpoint(path: Path, advice: str) -> Content:
    """The content of a checkpoint that save_checkpoint wrote.

    Raises UsageError for an unreadable or damaged one, the latter with `advice`. Nothing in the file is executed.
    """
    try:
        with path.open("rb") as file:
            damaged = zipfile.ZipFile(file).testzip()  # torch.load does not verify the checksums
        if damaged:
            raise ValueError(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of torch.load about files that are rejected below
            return _validated(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        raise UsageError(f"cannot read the checkpoint {path}: {error.strerror}. {advice}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:80]
        what = (
            "saved by another version of triton_lstm"
            if where == "format"
            else f"{where} {first['msg'].removeprefix('Value error, ')}".strip()
        )
        raise UsageError(f"{path} is not a checkpoint of `train`, or is damaged: {what}. {advice}") from None
    except Exception:
        raise UsageError(f"{path} is not a checkpoint of `train`, or is damaged. {advice}") from None


def _reason(error: BaseException) -> str:
    """The operating system's message, even if PyTorch has wrapped it."""
    if isinstance(error, OSError):
        return str(error.strerror)
    return _reason(error.__context__) if error.__context__ else str(error).splitlines()[0]
