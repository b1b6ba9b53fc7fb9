"""What commands have in common: numbers and figures as options, the device, whether the kernels run there."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from triton_lstm.dispatch import why_torch
from triton_lstm.settings import LARGEST, SEEDS, UsageError, device_for, require, spin_limit


def positive(text: str) -> int:
    """A size on the command line."""
    return _integer(text, 1, LARGEST)


def seed_number(text: str) -> int:
    """A seed on the command line."""
    return _integer(text, 0, SEEDS - 1)


def _integer(text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"must be an integer from {least} to {most}, got {text[:40]!r}")
    return int(text)


def check_plot(path: Path, suffixes: Sequence[str] = (".png", ".svg")) -> None:
    """Raises UsageError unless a figure can be saved there."""
    require("matplotlib")
    if path.suffix.lower() not in suffixes:
        known = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise UsageError(f"cannot save {path}: the suffix must be {known}. Choose another --plot")
    if path.exists() and not path.is_file():
        raise UsageError(f"cannot save {path}: it is not a regular file. Choose another --plot")
    if not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"cannot save {path}: its folder does not exist or is not writable. Choose another --plot")


def command_device(name: str | None) -> torch.device:
    """The device of a command; on the CPU the kernels run in Triton's interpreter."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("PyTorch found no usable GPU. Omit --device cuda to run on the CPU")
    return device_for(name)


def checked_backend(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why PyTorch's own LSTM runs; None if the kernels do. Raises UsageError for invalid settings."""
    try:
        reason = why_torch(dtype, device, None)
        if not reason:
            spin_limit()
        return None if reason is None else str(reason)
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from None
