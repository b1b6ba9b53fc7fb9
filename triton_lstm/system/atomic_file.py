"""Files that are written atomically: completely or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """The temporary file, next to `path`, that this process writes before it replaces `path`."""
    return Path(f"{path}.{os.getpid()}.tmp")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary file, which replaces `path` at the end of the block. Removes those of dead processes first."""
    remove_leftovers(glob.escape(str(path)))
    temporary = temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_leftovers(pattern: str) -> None:
    """Deletes the temporary files of dead processes for all paths that match a glob pattern."""
    for name in glob.glob(f"{pattern}.*.tmp"):
        if _is_dead(name.split(".")[-2]):
            with contextlib.suppress(OSError):
                os.unlink(name)


def _is_dead(process: str) -> bool:
    """Whether no process has this id; False if that cannot be determined."""
    if os.name != "posix" or not (process.isascii() and process.isdigit()):
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # another user's process
        pass
    return False


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name != "posix":
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
