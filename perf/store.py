"""The rows of a run on disk: none is lost or measured twice, and a crash is known to the next process."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from triton_lstm.perf.results import ALL_MODES, COLUMNS, FORMAT, KEY, MACHINE, SHAPE, derive, load, write
from triton_lstm.planning.devices import file_name
from triton_lstm.settings import UsageError
from triton_lstm.system.machine import now

Key = tuple[str, str, str]
CRASHED = {"status": "failed", "reason": "the process died while measuring this"}


class Store:
    """The rows of one CSV. Rows are written to disk when they are added; a repeated measurement replaces the old row.

    path: the CSV. about: the provenance columns; a file from another machine or code raises UsageError.
    `marker` (path.running), a CSV as well, lists what is being measured: if it exists at the start, the last run
    crashed there.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.marker = path.with_suffix(".running")
        self._rows: dict[Key, dict[str, Any]] = {}
        self._stale: set[Key] = set()
        if path.exists():
            before = load([path])
            for name in MACHINE:
                theirs = sorted(set(before[name]) - {about[name]}) if name != "commit" else []
                if theirs:
                    raise UsageError(
                        f"{path} was measured with {name} {theirs[0]!r}, this is {about[name]!r}: their rows must not "
                        "be mixed. Give another folder with --out, or move the file"
                    )
            self._rows = {_key(row): dict(row) for row in before.to_dict("records")}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._record_crash()

    def _record_crash(self) -> None:
        if not self.marker.exists():
            return
        rows = []
        with contextlib.suppress(UsageError):  # a damaged one
            rows = [dict(row) for row in load([self.marker]).to_dict("records")]
        rows = [row for row in rows if not self.has(*_key(row))]  # others have a known reason
        if rows:
            self.add(*rows)
        self.marker.unlink()

    def get(self, case: str, provider: str, mode: str) -> dict[str, Any] | None:
        """The row of this key, or the one for all modes of the provider on the case; None if it is not measured yet."""
        for key in ((case, provider, mode), (case, provider, ALL_MODES)):
            if key in self._rows and key not in self._stale:
                return self._rows[key]
        return None

    def has(self, case: str, provider: str, mode: str) -> bool:
        """Whether there is such a row."""
        return self.get(case, provider, mode) is not None

    def measure_again(self, row: dict[str, Any]) -> None:
        """Treats `row` as missing; it is kept until it is replaced."""
        self._stale.add(_key(row))

    def begin(self, *rows: dict[str, Any]) -> None:
        """Records that `rows` are about to be measured, in case the process crashes."""
        known = [{name: row[name] for name in (*KEY, *SHAPE, "why") if name in row} for row in rows]
        write(derive(pd.DataFrame([self._complete(row | CRASHED) for row in known])), self.marker)

    def end(self) -> None:
        """Records that nothing is being measured."""
        self.marker.unlink(missing_ok=True)

    def add(self, *rows: dict[str, Any]) -> None:
        """Adds rows, with the provenance columns, and writes the file."""
        for row in rows:
            case, provider, mode = _key(row)
            for key in [key for key in self._stale if key[:2] == (case, provider) and key[2] in (mode, ALL_MODES)]:
                self._stale.discard(key)
                self._rows.pop(key, None)
            self._rows[case, provider, mode] = self._complete(row)
        self.save()

    def _complete(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, **self.about, "date": now(), "format": FORMAT}

    def save(self) -> None:
        """Writes the file, as `add` has done unless it was interrupted."""
        if self._rows:
            write(self.frame(), self.path)

    def frame(self) -> pd.DataFrame:
        """All rows, with the derived columns."""
        return derive(pd.DataFrame(list(self._rows.values()), columns=None if self._rows else COLUMNS))


def _key(row: dict[str, Any]) -> Key:
    return str(row["case"]), str(row["provider"]), str(row["mode"])


def results_folder() -> Path:
    """perf/results/<gpu> in the current folder."""
    return Path("perf", "results", Path(file_name(torch.cuda.get_device_name())).stem)
