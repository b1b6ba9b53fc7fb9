"""Checkpoints of `train`: written atomically, and validated when they are read."""

from __future__ import annotations

import glob
import itertools
import signal
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from triton_lstm.settings import UsageError, require
from triton_lstm.system.atomic_file import atomic_write, remove_leftovers, temporary_name
from triton_lstm.system.signals import deferred_signals
from triton_lstm.training.config import Config

FORMAT = 1  # see checkpoint_content.py


def new_run(folder: Path) -> Path:
    """The path of a new run's checkpoint, in a new folder named by the time. Removes leftovers of killed runs."""
    remove_leftovers(f"{glob.escape(str(folder))}/*/train.pt")
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    for k in itertools.count(1):
        run = folder / (f"{name}_{k}" if k > 1 else name)
        try:
            run.mkdir(parents=True)
            break
        except FileExistsError as error:
            if not run.is_dir():
                raise _cannot_write(run, error) from None
        except OSError as error:
            raise _cannot_write(run, error) from None
    return run / "train.pt"


def newest_checkpoint(path: Path) -> Path:
    """`path` itself or, if it is a folder of runs, the checkpoint in it that was saved last."""
    if not path.is_dir():
        return path
    found = [file for pattern in ("*.pt", "*/*.pt") for file in path.glob(pattern) if file.is_file()]
    if not found:
        raise UsageError(f"{path} contains no checkpoint of `train`. Give one with --checkpoint, or train first")
    return max(found, key=lambda file: (file.stat().st_mtime_ns, file))


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes to a temporary file and renames it, so that a crash leaves the old checkpoint intact. Signals are deferred
    until it is done."""
    with deferred_signals() as received:
        try:
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                torch.save({"format": FORMAT} | content, file)
        except (OSError, RuntimeError) as error:  # torch.save closes its archive with a RuntimeError on a full disk
            raise _cannot_write(path, error) from None
    if received:  # pass it on to the outer handler
        signal.raise_signal(received[0])


def _cannot_write(path: Path, error: BaseException) -> UsageError:
    return UsageError(f"cannot write the checkpoint {path}: {_reason(error)}. Choose another --checkpoint")


def load_checkpoint(path: Path, advice: str = "Start over without --resume") -> tuple[Config, dict[str, Any]]:
    """The configuration and the content, as in checkpoint_content.Content, of a checkpoint that save_checkpoint wrote.

    Raises UsageError for an unreadable or damaged one, the latter with `advice`.
    """
    require("pydantic")
    from pydantic import ValidationError

    from triton_lstm.training.checkpoint_content import CHECKED

    if path.exists() and not path.is_file():
        raise UsageError(f"the checkpoint {path} is not a regular file")
    try:
        with path.open("rb") as file:
            damaged = zipfile.ZipFile(file).testzip()  # torch.load does not verify the checksums
        if damaged:
            raise ValueError(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of torch.load about files that are rejected below
            content = CHECKED.validate_python(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        remedy = "Train first, or give another --checkpoint"
        raise UsageError(f"cannot read the checkpoint {path}: {error.strerror}. {remedy}") from None
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
    return Config(**content["config"]), dict(content)


def prepare_checkpoint(path: Path, text: list[str], *, replace: bool) -> None:
    """Raises UsageError unless a checkpoint can be written to `path`; an existing one only if `replace`."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"cannot write the checkpoint {path}: it is not a regular file. Choose another one")
        if any(path.samefile(file) for file in text if path.exists()):
            raise UsageError(f"{path} is the text to train on. Choose another --checkpoint")
        if path.exists() and not replace:
            raise UsageError(f"{path} exists. Continue from it with --resume, or replace it with --overwrite")
        if path.exists() and not zipfile.is_zipfile(path):
            raise UsageError(
                f"{path} is not a checkpoint: --overwrite does not replace it. Choose another --checkpoint"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        temporary.touch()
        temporary.unlink()
    except (OSError, RuntimeError) as error:
        raise _cannot_write(path, error) from None


def _reason(error: BaseException) -> str:
    """The operating system's message, even if PyTorch has wrapped it."""
    if isinstance(error, OSError):
        return str(error.strerror)
    return _reason(error.__context__) if error.__context__ else str(error).splitlines()[0]
