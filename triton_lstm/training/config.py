"""The configuration of a training run."""

from __future__ import annotations

import dataclasses

from triton_lstm.settings import dtype_name

LARGEST, LAYERS, SEEDS = 1 << 31, 1000, 1 << 32  # the limits of sizes, layers and seeds
RATE = 1e30  # the largest learning rate: ten times as much has to fit float32


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything but the text that determines a run's losses. Saved in checkpoints.

    lr: Adam's learning rate, reached after `warmup` steps of linear warmup, followed by inverse square root decay.
    """

    hidden: int
    layers: int
    embed: int
    batch: int
    seq_len: int
    lr: float
    warmup: int
    dtype: str
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))


# The defaults in the interpreter, and on a GPU
SMALL = Config(hidden=64, layers=1, embed=32, batch=64, seq_len=12, lr=1.5e-2, warmup=80, dtype="fp32")
LARGE = Config(hidden=1024, layers=2, embed=512, batch=64, seq_len=256, lr=1e-3, warmup=100, dtype="bf16")
SMALL_STEPS, LARGE_STEPS = 320, 1000
