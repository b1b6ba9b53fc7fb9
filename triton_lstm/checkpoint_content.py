"""What a checkpoint of `train` holds: one description, which all that is read from a file has to fit."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, ConfigDict, Field, InstanceOf, TypeAdapter, with_config
from torch import nn
from typing_extensions import TypedDict

from triton_lstm import train
from triton_lstm.config import LARGEST, LAYERS, RATE, SEEDS, Config

AS_IT_IS = ConfigDict(strict=True, extra="forbid")
Size = Annotated[int, Field(ge=1, le=LARGEST)]
Tensors = dict[str, InstanceOf[torch.Tensor]]


@with_config(AS_IT_IS)
class Fields(TypedDict):
    """Of a Config."""

    hidden: Size
    layers: Annotated[int, Field(ge=1, le=LAYERS)]
    embed: Size
    batch: Size
    seq_len: Size
    lr: Annotated[float, Field(gt=0, le=RATE)]
    warmup: Size
    dtype: Literal["fp16", "bf16", "tf32", "fp32", "fp64"]
    seed: Annotated[int, Field(ge=0, lt=SEEDS)]


@with_config(AS_IT_IS)
class Content(TypedDict):
    """text: the files, None for Python's own library. digest: of their bytes. losses: in nats, one a step.

    exp_avg, exp_avg_sq: Adam's means, by the names of the model's parameters.
    """

    format: Literal[1]
    config: Fields
    text: Annotated[list[str], Field(min_length=1)] | None
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    losses: list[float]
    model: Tensors
    exp_avg: Tensors
    exp_avg_sq: Tensors


def _fitting(content: Content) -> Content:
    with torch.device("meta"):  # of any size at no cost
        made = train.build(Config(**content["config"]), torch.device("meta"), nn.LSTM).state_dict()
    for found in (content["model"], content["exp_avg"], content["exp_avg_sq"]):
        if found.keys() != made.keys() or not all(_alike(found[name], tensor) for name, tensor in made.items()):
            raise ValueError("the tensors do not fit the sizes")
    if any((squares < 0).any() for squares in content["exp_avg_sq"].values()):
        raise ValueError("a mean of squares is below 0")
    return content


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `a`, which holds something, is of the kind of `b`, which need not."""
    return not a.is_meta and (a.shape, a.dtype, a.layout) == (b.shape, b.dtype, b.layout)


CHECKED: TypeAdapter[Content] = TypeAdapter(Annotated[Content, AfterValidator(_fitting)])
