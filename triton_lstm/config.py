"""The sizes of a training run, and what the command line says when something is wrong with it."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from typing import Any, NoReturn

import torch

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


class UsageError(Exception):
    """Something the user can mend; its text says what and how."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What determines a run's losses, next to the text. Saved in checkpoints."""

    hidden: int
    layers: int
    embed: int
    batch: int
    seq_len: int
    lr: float
    dtype: str
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))


SMALL = Config(hidden=64, layers=2, embed=32, batch=32, seq_len=24, lr=1e-2, dtype="float32")  # the interpreter
LARGE = Config(hidden=1024, layers=2, embed=512, batch=64, seq_len=256, lr=1e-3, dtype="bfloat16")  # a GPU


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP, where they are not ignored, are what Ctrl-C is."""

    def interrupt(signum: int, stack: Any) -> NoReturn:
        raise KeyboardInterrupt

    signals = [name for name in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(name) is not signal.SIG_IGN]
    before = {name: signal.signal(name, interrupt) for name in signals}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def require(*packages: str) -> None:
    """Raises UsageError for a package that cannot be imported."""
    for package in packages:
        try:
            __import__(package)
        except ImportError:
            raise UsageError(f'this needs {package}: pip install ".[perf]" in the checkout') from None
        except Exception as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(f"{package} cannot be imported: {why}") from None
