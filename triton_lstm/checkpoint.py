"""Checkpoints of `train`: written whole or not at all, and looked at before they are believed."""

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

from triton_lstm.config import Config, UsageError, require
from triton_lstm.signals import interrupts
from triton_lstm.whole_file import beside, remove_leftovers, written_whole

FORMAT = 1  # see checkpoint_content.py


def new_run(folder: Path) -> Path:
    """A checkpoint's place in a folder of its own, made now and named by the time. What killed runs left there goes."""
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
    """`path` itself or, where it is a folder of runs, the checkpoint in it that was saved last."""
    if not path.is_dir():
        return path
    found = [file for pattern in ("*.pt", "*/*.pt") for file in path.glob(pattern) if file.is_file()]
    if not found:
        raise UsageError(f"{path} holds no checkpoint of `train`. Name one with --checkpoint, or train first")
    return max(found, key=lambda file: (file.stat().st_mtime_ns, file))


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes beside `path` and renames, so that a crash leaves the old checkpoint whole; signals wait for the end."""
    with interrupts() as seen:
        try:
            with written_whole(path) as fresh, fresh.open("wb") as file:
                torch.save({"format": FORMAT} | content, file)
        except (OSError, RuntimeError) as error:  # torch.save closes its archive with a RuntimeError on a full disk
            raise _cannot_write(path, error) from None
    if seen:  # whoever handles it outside is told now
        signal.raise_signal(seen[0])


def _cannot_write(path: Path, error: BaseException) -> UsageError:
    return UsageError(f"cannot write the checkpoint {path}: {_why(error)}. Name another --checkpoint")


def load_checkpoint(path: Path, advice: str = "Start afresh without --resume") -> tuple[Config, dict[str, Any]]:
    """The configuration and the rest of a checkpoint that save_checkpoint wrote, by the names of
    checkpoint_content.Content; `advice` goes with a damaged one."""
    require("pydantic")
    from pydantic import ValidationError

    from triton_lstm.checkpoint_content import CHECKED

    if path.exists() and not path.is_file():
        raise UsageError(f"the checkpoint {path} is not a regular file")
    try:
        with path.open("rb") as file:
            damaged = zipfile.ZipFile(file).testzip()  # torch.load does not look at the checksums
        if damaged:
            raise ValueError(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load's, of what is refused in one line below
            content = CHECKED.validate_python(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        remedy = "Train first, or name another --checkpoint"
        raise UsageError(f"cannot read the checkpoint {path}: {error.strerror}. {remedy}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:80]
        what = (
            "saved by another version of triton_lstm"
            if where == "format"
            else f"{where} {first['msg'].removeprefix('Value error, ')}".strip()
        )
        raise UsageError(f"{path} is no checkpoint of `train`, or is damaged: {what}. {advice}") from None
    except Exception:
        raise UsageError(f"{path} is no checkpoint of `train`, or is damaged. {advice}") from None
    return Config(**content["config"]), dict(content)


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
        fresh = beside(path)
        fresh.touch()
        fresh.unlink()
    except (OSError, RuntimeError) as error:
        raise _cannot_write(path, error) from None


def _why(error: BaseException) -> str:
    """The system's reason, also where PyTorch has wrapped it."""
    if isinstance(error, OSError):
        return str(error.strerror)
    return _why(error.__context__) if error.__context__ else str(error).splitlines()[0]
