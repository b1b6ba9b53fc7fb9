"""The folder of a run: its configuration, where it came from, its checkpoints, and a lock."""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib.metadata
import itertools
import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from triton_lstm.settings import UsageError
from triton_lstm.system.atomic_file import atomic_write, remove_leftovers
from triton_lstm.system.machine import commit, now
from triton_lstm.system.version import __version__
from triton_lstm.training.checkpoint import DELETED, STATE, UNFINISHED
from triton_lstm.training.config import Config, for_file

FULL = errno.ENOSPC, errno.EDQUOT
NAME = re.compile(r"step_(\d{8,12})")
BEGINNINGS = ".lock", "checkpoints", "about.yaml"
RESTART_S = 30  # in which what a killed process has started ends, too


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step_"))


class RunFolder:
    """config.yaml, about.yaml, metrics.csv and checkpoints/ of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def best(self) -> Path:
        return self.checkpoints / "best"

    def steps(self) -> list[Path]:
        """The checkpoints that are kept, oldest first."""
        found = [folder for folder in self.checkpoints.glob("step_*") if NAME.fullmatch(folder.name)]
        return sorted((folder for folder in found if (folder / STATE).is_file()), key=step_of)

    def at(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.checkpoints / f"step_{step:08}"

    def mark_best(self, step: int) -> None:
        """Makes the checkpoint of a step the best one, by a link.

        Raises UsageError if that is not possible.
        """
        try:
            with atomic_write(self.best) as temporary:
                temporary.symlink_to(self.at(step).name)
        except OSError as error:
            raise _unwritable(self.best, error) from None

    def keep(self, number: int) -> None:
        """Deletes all checkpoints but the last `number` and the best one."""
        best = os.path.realpath(self.best)
        for folder in self.steps()[:-number]:
            if os.path.realpath(folder) != best:
                with contextlib.suppress(OSError):
                    deleted = folder.rename(f"{folder}{DELETED}")  # at once: a part of a checkpoint is none
                    shutil.rmtree(deleted)

    def write_about(self, config: Config, device: torch.device, digest: str, processes: int) -> None:
        """Writes config.yaml, which --config reads, and about.yaml: versions, git commit, device, command and time of
        the first start, and of all others below it.

        Raises UsageError if that is not possible.
        """
        import yaml

        about: dict[str, Any] = {
            "torch": str(torch.__version__),  # with the version of CUDA, which its package need not have
            **{name: _version(name) for name in ("triton", "numpy", "tokenizers")},
            "triton_lstm": __version__,
            "commit": commit(),
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "processes": processes,
            "command": shlex.join(sys.orig_argv),
            "text": digest,
            "started": now(),
        }
        about = {name: value for name, value in about.items() if value}
        with contextlib.suppress(yaml.YAMLError, OSError, ValueError):
            first = yaml.safe_load((self.path / "about.yaml").read_text(encoding="utf-8"))
            if isinstance(first, dict) and isinstance(later := first.get("resumed", []), list):
                about = first | {"resumed": [*later, about]}
        try:
            for name, content in (("about.yaml", about), ("config.yaml", for_file(config))):
                with atomic_write(self.path / name) as temporary:
                    temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def prepare(self) -> None:
        """Removes what killed processes left behind, and makes the folder of the checkpoints. In a locked run.

        Raises UsageError if that is not possible.
        """
        try:
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise _unwritable(self.checkpoints, error) from None
        for place in (self.path, self.checkpoints):
            remove_leftovers(f"{glob.escape(str(place))}{os.sep}*")
        for pattern in (f"*{UNFINISHED}", f"*{DELETED}"):
            for folder in self.checkpoints.glob(pattern):
                shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def locked(self, wait: bool = False) -> Iterator[None]:
        """Inside the block no other process can write to this run. Raises UsageError if one does.

        wait: it may be what a killed process has left running, which ends soon.
        """
        import filelock

        lock = filelock.FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=RESTART_S if wait else 0)
        except filelock.Timeout:
            raise UsageError(
                f"{self.path} is in use by another process. Wait for it, or choose another --folder"
            ) from None
        except (OSError, NotImplementedError) as error:
            raise _unwritable(self.path, error) from None
        try:
            yield
        finally:
            lock.release()


def new_run(path: Path | None, runs: Path, repeated: bool = False) -> RunFolder:
    """A new folder: `path`, or one in `runs` named by the time. Raises UsageError if it exists or cannot be made.

    repeated: the same command may have been killed before as soon as it had made the folder.
    """
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    for k in itertools.count(1):
        folder = path or runs / (f"{name}_{k}" if k > 1 else name)
        try:
            folder.mkdir(parents=True)
            return RunFolder(folder)
        except FileExistsError as error:
            began = path and ((path / "config.yaml").is_file() or (repeated and _has_only_beginnings(path)))
            if path and began and not RunFolder(path).steps():
                return RunFolder(path)  # it ended before its first checkpoint
            if path:
                what = "Continue it with --resume, or choose" if RunFolder(path).steps() else "It is no run: choose"
                raise UsageError(f"{path} exists. {what} another --folder") from None
            if not folder.is_dir():
                raise _unwritable(folder, error) from None
        except (OSError, ValueError) as error:  # no system call accepts a name with a null character
            raise _unwritable(folder, error) from None
    raise AssertionError


def _has_only_beginnings(path: Path) -> bool:
    """Whether a folder has nothing but what is written before config.yaml."""
    return path.is_dir() and all(file.name in BEGINNINGS or file.suffix == UNFINISHED for file in path.iterdir())


def existing_run(path: Path | None, runs: Path) -> RunFolder:
    """The run at `path`, or the one in `runs` that saved a checkpoint last. Raises UsageError if there is none."""
    if path:
        folder = RunFolder(path)
        if not folder.steps():
            raise UsageError(
                f"{path} has no checkpoint of `train`. Choose another --folder, or start it without --resume"
            )
        return folder
    return RunFolder(newest_checkpoint(runs).parents[1])


def newest_checkpoint(path: Path) -> Path:
    """`path` itself or, if it is a run or a folder of runs, the checkpoint in it that was saved last.

    Raises UsageError if there is none.
    """
    if (path / STATE).is_file():
        return path
    runs = [path, *(folder for folder in sorted(path.glob("*")) if folder.is_dir())]
    found = [file for run in runs for file in RunFolder(run).steps()]
    if not found:
        what = "contains no checkpoint of `train`" if path.exists() else "does not exist"
        raise UsageError(f"{path} {what}. Train first, or name another run")
    return max(found, key=lambda folder: ((folder / STATE).stat().st_mtime_ns, folder))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _unwritable(path: Path, error: BaseException) -> UsageError:
    why = getattr(error, "strerror", None) or str(error)
    remedy = "Free some space, or choose" if getattr(error, "errno", None) in FULL else "Choose"
    return UsageError(f"cannot write to {path}: {why}. {remedy} another --folder")
