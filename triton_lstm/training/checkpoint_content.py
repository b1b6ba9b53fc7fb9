"""The schema of a checkpoint of `train`, which every file that is read must match."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, ConfigDict, Field, InstanceOf, TypeAdapter, with_config
from torch import nn
from typing_extensions import TypedDict

from triton_lstm.training.config import LARGEST, LAYERS, RATE, SEEDS, Config
from triton_lstm.training.model import build

STRICT = ConfigDict(strict=True, extra="forbid")
Size = Annotated[int, Field(ge=1, le=LARGEST)]
Tensors = dict[str, InstanceOf[torch.Tensor]]


@with_config(STRICT)
class Fields(TypedDict):
    """The fields of a Config."""

    hidden: Size
    layers: Annotated[int, Field(ge=1, le=LAYERS)]
    embed: Size
    batch: Size
    seq_len: Size
    lr: Annotated[float, Field(gt=0, le=RATE)]
    warmup: Size
    dtype: Literal["fp16", "bf16", "tf32", "fp32", "fp64"]
    seed: Annotated[int, Field(ge=0, lt=SEEDS)]


@with_config(STRICT)
class Content(TypedDict):
    """text: the files, None for Python's standard library. digest: of their bytes. losses: in nats, one per step.

    exp_avg, exp_avg_sq: Adam's moments, by parameter name.
    """

    format: Literal[1]
    config: Fields
    text: Annotated[list[str], Field(min_length=1)] | None
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    losses: list[float]
    model: Tensors
    exp_avg: Tensors
    exp_avg_sq: Tensors


def _check_tensors(content: Content) -> Content:
    with torch.device("meta"):  # allocates nothing, whatever the size
        expected = build(Config(**content["config"]), torch.device("meta"), nn.LSTM).state_dict()
    for found in (content["model"], content["exp_avg"], content["exp_avg_sq"]):
        if found.keys() != expected.keys() or not all(_alike(found[name], t) for name, t in expected.items()):
            raise ValueError("the tensors do not match the sizes")
    if any((squares < 0).any() for squares in content["exp_avg_sq"].values()):
        raise ValueError("a second moment is negative")
    return content


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `a` has data, and the shape, dtype and layout of `b`."""
    return not a.is_meta and (a.shape, a.dtype, a.layout) == (b.shape, b.dtype, b.layout)


CHECKED: TypeAdapter[Content] = TypeAdapter(Annotated[Content, AfterValidator(_check_tensors)])
