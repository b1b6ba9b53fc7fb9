"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path


def beside(path: Path) -> Path:
    """Where this process writes what is to become `path`."""
    return Path(f"{path}.{os.getpid()}.tmp")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file to write to, which replaces `path` at the end of the block. What killed processes left of theirs goes."""
    remove_leftovers(glob.escape(str(path)))
    fresh = beside(path)
    try:
        yield fresh
        os.replace(fresh, path)
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink()


def remove_leftovers(pattern: str) -> None:
    """Deletes what processes that are dead have left beside the files of a pattern."""
    for name in glob.glob(f"{pattern}.*.tmp"):
        if _is_dead(name.split(".")[-2]):
            with contextlib.suppress(OSError):
                os.unlink(name)


def _is_dead(process: str) -> bool:
    """Whether no process has this number; False where that cannot be told."""
    if os.name != "posix" or not (process.isascii() and process.isdigit()):
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # somebody else's
        pass
    return False
