"""A folder of a cache: complete or not there, and made by one process at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

import filelock

from triton_lstm.settings import UsageError
from triton_lstm.system.atomic_file import sync

Content = TypeVar("Content")
SOON_S = 3.0  # a wait of another process that is not worth a message
DAMAGED = OSError, ValueError, KeyError, TypeError, EOFError


def cache_folder(named: str | None) -> Path:
    """The named folder, else the platform's for token files. Raises UsageError if that is unknown."""
    folder = Path(os.path.expanduser(named or _platform_folder()))
    if str(folder).startswith("~"):
        raise UsageError(f"--cache {named} begins with the home folder of nobody here. Give a folder that can be made")
    return folder.absolute()


def _platform_folder() -> str:
    try:
        import platformdirs
    except ImportError:
        raise UsageError(
            "the folder for token files is unknown: platformdirs is missing. Give one by --cache"
        ) from None
    folder = os.path.join(platformdirs.user_cache_dir("triton_lstm", False), "text")
    if not os.path.isabs(folder):
        raise UsageError("the folder for token files is unknown: there is no home folder. Give one by --cache")
    return folder


def cached(folder: Path, read: Callable[[Path], Content], make: Callable[[Path], None]) -> Content:
    """What `read` returns for `folder`, which `make` fills first unless it is there and not damaged.

    Processes that want the same folder wait for the one that makes it. After kill -9 or a power failure the folder is
    complete or not there. What is left of it is removed with the next folder that is made.

    Args:
        folder: its name is hexadecimal digits.
        read: raises one of DAMAGED for a damaged folder.
        make: fills an empty folder, given to it. Its OSErrors are about this folder only.

    Raises:
        UsageError: if the folder cannot be written; nothing is left then.
    """
    with contextlib.suppress(*DAMAGED):
        return read(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # no system call accepts a name with a null character
        _unwritable(folder.parent, error)
    try:
        with _locked(folder):
            with contextlib.suppress(*DAMAGED):
                return read(folder)  # another process has just made it
            _remove_leftovers(folder)
            _replace(folder, make)
        return read(folder)
    except OSError as error:
        _unwritable(folder.parent, error)


def _unwritable(parent: Path, error: Exception) -> NoReturn:
    why = getattr(error, "strerror", None) or error
    what = f"cannot write token files in the folder {parent}: {why}"
    raise UsageError(f"{what}. Free space there, or give another folder by --cache") from None


def _replace(folder: Path, make: Callable[[Path], None]) -> None:
    temporary = _temporary(folder)
    _remove(temporary)
    try:
        temporary.mkdir()
        make(temporary)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        _remove(folder)
        os.rename(temporary, folder)
        sync(folder.parent)
    finally:
        _remove(temporary)


def _temporary(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.tmp")  # only who has the folder's lock touches it


def _lock(folder: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(folder.with_name(f"{folder.name}.lock"))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = _lock(folder)
    try:
        lock.acquire(timeout=SOON_S)
    except filelock.Timeout:
        print(f"waiting for another process that writes {folder}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(folder: Path) -> None:
    """Removes what dead processes have left of other folders: a live process holds the lock."""
    for other in folder.parent.glob(f"{'[0-9a-f]' * len(folder.name)}.tmp"):
        if other != _temporary(folder):
            with contextlib.suppress(OSError), _lock(other.with_suffix("")).acquire(timeout=0):
                _remove(other)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
