"""Where tuned tables are, and what is known about a GPU: all of its tables merged.

Each GPU has its own JSON file. Shipped tables are in tuned/; a user's, in a cache folder, take precedence. They are
read when the first plan is needed.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from triton_lstm.planning.devices import file_name
from triton_lstm.settings import tables_folder
from triton_lstm.tuning.table_file import OutdatedError, Table, TableError, read

SHIPPED = Path(__file__).parents[1] / "tuned"
FOLDER = "TRITON_LSTM_TUNED"  # the environment variable that replaces the platform's cache folder


def user_folder() -> Path | None:
    """Where a user's tables are: TRITON_LSTM_TUNED, or the platform's cache folder; None where that is unknown, because
    platformdirs or a home folder is missing.

    Raises TableError where TRITON_LSTM_TUNED begins with a home folder that does not exist.
    """
    named = tables_folder()
    if named:
        folder = os.path.expanduser(named)
        if folder.startswith("~"):
            raise TableError(f"{FOLDER}={named} begins with the home folder of a user that does not exist")
        return Path(folder)
    try:
        import platformdirs
    except ImportError:
        return None
    cache = Path(platformdirs.user_cache_dir("triton_lstm", appauthor=False))
    return cache / "tuned" if cache.is_absolute() else None


def places(gpu: str) -> list[Path]:
    """Where a table for `gpu` may be; later ones take precedence. Raises TableError as `user_folder` does."""
    folders = [SHIPPED, user_folder()]
    return [folder / file_name(gpu) for folder in folders if folder]


def tables_of(gpu: str) -> Iterator[tuple[Path, Table | TableError]]:
    """Every existing file for `gpu`, in the order of `places`: its table, or what is wrong with it."""
    try:
        paths = places(gpu)
    except TableError as error:
        yield Path(os.environ[FOLDER]), error
        paths = [SHIPPED / file_name(gpu)]
    for path in paths:
        try:
            yield path, read(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            yield path, TableError(error.strerror)
        except TableError as error:
            yield path, error


@functools.lru_cache(maxsize=64)
def table_for(gpu: str) -> Table:
    """Everything known about `gpu`, possibly nothing. A file that cannot be used is named in one warning."""
    merged = Table({"gpu": gpu})
    for path, found in tables_of(gpu):
        if isinstance(found, TableError):
            old = isinstance(found, OutdatedError)
            remedy = "`triton-lstm tune` makes a new one" if old else "Delete or repair it"
            warnings.warn(f"the tuned table {path} is ignored: {found}. {remedy}.", stacklevel=2)
        else:
            merged.add(*found.plans.values(), *found.layers.values())
    return merged
