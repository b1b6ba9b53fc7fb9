"""The sizes of a training run, and what the command line says when something is wrong with it."""

from __future__ import annotations

import dataclasses

import torch

from triton_lstm.backend import why_no_triton

LARGEST, LAYERS, SEEDS = 1 << 31, 1000, 1 << 32  # a size of the model or the batch; layers at most; seeds there are
RATE = 1e30  # the largest learning rate: of float32 numbers Adam makes ten times as much
# The names of all commands, tables and results; tf32 and fp32 are float32 with TF32 allowed or not
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
SPELLINGS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}  # PyTorch's, read as well


def dtype_name(text: str) -> str:
    """In DTYPES' spelling, if it is one of them; else as it was."""
    return SPELLINGS.get(text, text)


SHOWING = ("pandas", "matplotlib", "rich", "tabulate", "jinja2")  # the extra `perf`


class UsageError(Exception):
    """Something the user can mend; its text says what and how."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What determines a run's losses, next to the text. Saved in checkpoints.

    lr: Adam's rate after `warmup` steps, up to which it rises; from there on it falls with the root of the step.
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


# In the interpreter, and on a GPU
SMALL = Config(hidden=64, layers=1, embed=32, batch=64, seq_len=12, lr=1.5e-2, warmup=80, dtype="fp32")
LARGE = Config(hidden=1024, layers=2, embed=512, batch=64, seq_len=256, lr=1e-3, warmup=100, dtype="bf16")
SMALL_STEPS, LARGE_STEPS = 320, 1000


def require(*packages: str) -> None:
    """Raises UsageError for a package that cannot be imported, or a triton that is none."""
    for package in packages:
        if package == "triton" and (reason := why_no_triton()):
            raise UsageError(f"this needs triton: {reason}")
        try:
            __import__(package)
        except ImportError:
            raise UsageError(f'this needs {package}: pip install ".[perf]" in the checkout') from None
        except Exception as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(f"{package} cannot be imported: {why}") from None
