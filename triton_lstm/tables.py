"""Which plan a call takes: the measured one of a tuned table, its nearest neighbour's, or the one nobody measured.

Tables are one JSON file per GPU. Shipped ones lie in tuned/, a user's in a cache folder and win. They are read when a
plan is first asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from triton_lstm.devices import Device
from triton_lstm.limits import why_not
from triton_lstm.plan import Plan, make_plan
from triton_lstm.table_file import Key, LayerTime, OutdatedError, Table, TableError, Tuned, bucket, file_name, read

SHIPPED = Path(__file__).parent / "tuned"
FOLDER = "TRITON_LSTM_TUNED"  # the environment variable that names another folder than the platform's cache
NEAR = 1.0  # how far, in doublings of H and of B together, a neighbour may be


@dataclasses.dataclass(frozen=True)
class Choice:
    """A plan and the measurement that it is from, perhaps a neighbour's; None where nobody has measured one."""

    plan: Plan
    tuned: Tuned | None

    def exactly(self, key: Key) -> bool:
        """Whether the measurement is of this very key."""
        return self.tuned is not None and self.tuned.key == dataclasses.replace(key, B=bucket(key.B))


def user_folder() -> Path | None:
    """Where a user's tables lie: TRITON_LSTM_TUNED, or the platform's cache folder; None where nobody can tell it, for
    want of platformdirs or of a home.

    Raises TableError where TRITON_LSTM_TUNED begins with a home that there is not.
    """
    named = os.environ.get(FOLDER)
    if named:
        folder = os.path.expanduser(named)
        if folder.startswith("~"):
            raise TableError(f"{FOLDER}={named} begins with the home folder of a user that there is not")
        return Path(folder)
    try:
        import platformdirs
    except ImportError:
        return None
    cache = Path(platformdirs.user_cache_dir("triton_lstm", appauthor=False))
    return cache / "tuned" if cache.is_absolute() else None


def places(gpu: str) -> list[Path]:
    """Where a table for `gpu` may lie; a later one wins. Raises TableError as `user_folder` does."""
    folders = [SHIPPED, user_folder()]
    return [folder / file_name(gpu) for folder in folders if folder]


def tables_of(gpu: str) -> Iterator[tuple[Path, Table | TableError]]:
    """Every file there is for `gpu`, in the order of `places`: its table, or what is wrong with it."""
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
    """All that is known of `gpu`; empty if nothing. A file that cannot be used is named in one warning."""
    merged = Table({"gpu": gpu})
    for path, found in tables_of(gpu):
        if isinstance(found, TableError):
            old = isinstance(found, OutdatedError)
            remedy = "`triton-lstm tune` makes a new one" if old else "Delete it, or mend it"
            warnings.warn(f"the tuned table {path} is ignored: {found}. {remedy}.", stacklevel=2)
        else:
            merged.add(*found.plans.values(), *found.layers.values())
    return merged


def layer_time(gpu: str, mode: str, dtype: str, hidden_size: int, batch: int) -> LayerTime | None:
    """The measured times of a layer of this size and of `batch`'s bucket."""
    return table_for(gpu).layers.get((mode, dtype, hidden_size, bucket(batch)))


def remember(gpu: str, *found: Tuned) -> None:
    """Adds measurements to what this process knows."""
    table = table_for(gpu)
    table.plans = table.plans | {entry.key: entry for entry in found}  # another thread may be reading the old one
    choose.cache_clear()


def forget() -> None:
    """Tables are read anew when a plan is next asked for."""
    table_for.cache_clear()
    choose.cache_clear()


@functools.lru_cache(maxsize=4096)
def choose(device: Device, key: Key, directions: int = 1) -> Choice:
    """The plan for a layer; key.B is the batch itself.

    A neighbour has the same direction and dtype, and at most twice or half of H and B in all; entries that this device
    cannot run are passed over, and for a layer with two directions of time those that cannot run both at once.
    """
    entries = table_for(device.name).plans.values() if device.backend != "interpreter" else ()
    wanted, itemsize = dataclasses.replace(key, B=bucket(key.B)), device.itemsize(key.dtype)

    def distance(entry: Tuned) -> float:
        return abs(math.log2(entry.key.H / wanted.H)) + abs(math.log2(entry.key.B / wanted.B))

    alike = [e for e in entries if (e.key.backward, e.key.dtype) == (wanted.backward, wanted.dtype)]
    for entry in sorted((e for e in alike if distance(e) <= NEAR), key=distance):
        if why_not(device, itemsize, wanted.H, wanted.backward, entry.plan) is not None:
            continue
        plan = entry.plan.on(device, itemsize, key.B, wanted.H, wanted.backward, directions)
        if directions == 1 or plan.beside(device, itemsize, wanted.H, wanted.backward):
            return Choice(plan, entry)
    return Choice(make_plan(device, itemsize, key.B, key.H, key.backward, directions), None)
