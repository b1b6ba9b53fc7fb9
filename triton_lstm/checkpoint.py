"""Checkpoints of `train`: written whole or not at all, and looked at before they are believed."""

from __future__ import annotations

import dataclasses
import os
import signal
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from triton_lstm.config import DTYPES, Config, UsageError


@contextmanager
def interrupts() -> Iterator[list[bool]]:
    """Inside the block, the first Ctrl-C only fills the list: the step under way ends before anything is saved."""
    seen: list[bool] = []

    def handler(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(True)

    shipped = signal.signal(signal.SIGINT, handler)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, shipped)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes beside `path` and renames, so that a crash leaves the old checkpoint whole; Ctrl-C waits for the end."""
    beside = _beside(path)
    with interrupts() as seen:
        try:
            with beside.open("wb") as file:
                torch.save(content, file)
            os.replace(beside, path)
        except (OSError, RuntimeError) as error:  # torch.save closes its archive with a RuntimeError on a full disk
            raise _cannot_write(path, error) from None
        finally:
            with suppress(OSError):
                beside.unlink()
    if seen:  # whoever handles Ctrl-C outside is told now
        signal.raise_signal(signal.SIGINT)


def _beside(path: Path) -> Path:
    return Path(f"{path}.{os.getpid()}.tmp")


def _cannot_write(path: Path, error: BaseException) -> UsageError:
    return UsageError(f"cannot write the checkpoint {path}: {_why(error)}. Name another --checkpoint")


def load_checkpoint(path: Path, advice: str = "Start afresh without --resume") -> tuple[Config, dict[str, Any]]:
    """The configuration and the rest of a checkpoint that save_checkpoint wrote; `advice` goes with a damaged one."""
    if path.exists() and not path.is_file():
        raise UsageError(f"the checkpoint {path} is not a regular file")
    try:
        with path.open("rb") as file:
            damaged = zipfile.ZipFile(file).testzip()  # torch.load does not look at the checksums
        if damaged:
            raise ValueError(damaged)
        content = torch.load(path, map_location="cpu", weights_only=True)
        config = Config(**content["config"])
        for field in dataclasses.fields(Config):
            value = getattr(config, field.name)
            least = 0 if field.name == "seed" else 1
            if type(value).__name__ != field.type or (field.type == "int" and value < least):
                raise ValueError(field.name)
        if config.dtype not in DTYPES or not all(type(loss) is float for loss in content["losses"]):
            raise ValueError("dtype or losses")
        if not {"text", "digest", "model", "optimizer"} <= content.keys():
            raise ValueError("something is missing")
        return config, content
    except OSError as error:
        raise UsageError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except Exception:
        raise UsageError(f"{path} is no checkpoint of `train`, or is damaged. {advice}") from None


def prepare_checkpoint(path: Path, text: list[str], *, replace: bool) -> None:
    """Raises unless a checkpoint can be written to `path` later on, over a checkpoint only if `replace`."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"cannot write the checkpoint {path}: it is not a regular file. Name another --checkpoint")
        if any(path.samefile(file) for file in text if path.exists()):
            raise UsageError(f"{path} is the text to train on. Name another --checkpoint")
        if path.exists() and not replace:
            raise UsageError(f"{path} exists. Go on from it with --resume, or replace it with --overwrite")
        if path.exists() and not zipfile.is_zipfile(path):
            raise UsageError(f"{path} is no checkpoint, and --overwrite replaces only those. Name another --checkpoint")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = _beside(path)
        beside.touch()
        beside.unlink()
    except (OSError, RuntimeError) as error:
        raise _cannot_write(path, error) from None


def _why(error: BaseException) -> str:
    """The system's reason, also where PyTorch has wrapped it."""
    if isinstance(error, OSError):
        return str(error.strerror)
    return _why(error.__context__) if error.__context__ else str(error).splitlines()[0]
