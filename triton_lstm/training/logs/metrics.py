"""What a run logs: metrics.csv, and the trackers besides it."""

from __future__ import annotations

import contextlib
import io
import numbers
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from triton_lstm.gradients.results import Gradients
from triton_lstm.settings import UsageError
from triton_lstm.system.atomic_file import atomic_write
from triton_lstm.system.terminal import Bar, escaped
from triton_lstm.training.config import Config
from triton_lstm.training.logs.trackers import Tracker, first_line, open_trackers, require_trackers

FILE = "metrics.csv"
COLUMNS = (
    "step",
    "tokens",
    "seconds",
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_s",
    "loss_scale",
    "validation_loss",
    "bits_per_byte",
)
HEADER = f"{','.join(COLUMNS)}\n".encode()


class Metrics:
    """metrics.csv in a run's folder, and TensorBoard and Weights & Biases if `config.output` asks for them.

    A context manager. Entering it drops the rows after step `resumed_from`, which a killed process logged beyond its
    last checkpoint, and a row that was written only in part. If TensorBoard or Weights & Biases fails later, a line on
    standard error says so, and the run goes on without.

    Args:
        folder: the run's; it exists.
        config: the run's.
        resumed_from: the step of the checkpoint with which the run goes on; 0 for a new run.

    Raises:
        UsageError: on entering, if metrics.csv is not one of a run, which is left as it is; if a package is missing;
            if Weights & Biases does not begin the run.
        OSError: if metrics.csv cannot be written, at any time.
    """

    def __init__(self, folder: Path, config: Config, resumed_from: int = 0) -> None:
        self._path = folder / FILE
        self._config = config
        self._resumed_from = resumed_from
        self._file: io.FileIO | None = None
        self._trackers: list[Tracker] = []

    def __enter__(self) -> Metrics:
        require_trackers(self._config)
        repair(self._path, self._resumed_from)
        self._file = open(self._path, "ab", buffering=0)
        try:
            for tracker in open_trackers(self._path.parent, self._config, self._resumed_from):
                self._trackers.append(tracker)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()
        self._each(lambda tracker: tracker.close(0 if kind is None else 1))
        self._trackers = []

    def log(self, step: int, **values: Any) -> None:
        """Logs a row.

        Args:
            step: how many steps are done.
            values: numbers by column; None for one that is not logged.

        Raises:
            ValueError: for an unknown column.
            OSError: if the row cannot be written.
        """
        logged = {name: value for name, value in values.items() if value is not None}
        if unknown := logged.keys() - set(COLUMNS[1:]):
            raise ValueError(f"metrics.csv has no columns {', '.join(sorted(unknown))}")
        row = {"step": step, **logged}
        self._write(f"{','.join(_cell(row.get(name)) for name in COLUMNS)}\n".encode())
        scalars = {name: float(value) for name, value in logged.items()}
        self._each(lambda tracker: tracker.log(step, scalars))

    def sync(self) -> None:
        """Flushes metrics.csv to the disk. Raises OSError if that fails."""
        if self._file:
            os.fsync(self._file.fileno())

    def log_text(self, step: int, sample: str) -> None:
        """Shows a text of the model in TensorBoard and Weights & Biases."""
        self._each(lambda tracker: tracker.log_text(step, sample))

    def log_gradients(self, step: int, grads: Gradients) -> None:
        """Shows recorded gradients there: scalars by layer and quantity, and norms by time step and layer as a figure.

        grads: of `record_gradients`, with a backward pass.
        """
        self._each(lambda tracker: tracker.log_gradients(step, grads))

    def _write(self, row: bytes) -> None:
        if self._file is None:
            raise ValueError("Metrics is a context manager: log inside of its block")
        try:
            while row:  # all in one call, unless the disk is full: the next one then says so
                row = row[self._file.write(row) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                why = escaped(first_line(error))
                Bar.write(f"{tracker.name} failed: {why}. This run no longer logs to it", file=sys.stderr)
                with contextlib.suppress(Exception):
                    tracker.close(1)


def _cell(value: Any) -> str:
    """Floats by repr, with which two runs can be compared bit for bit."""
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, numbers.Integral) else repr(float(value))


def repair(path: Path, last_step: int) -> None:
    """Makes metrics.csv end with step `last_step`, or creates it; atomically.

    Raises UsageError if it is not one of a run, and leaves it as it is.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a regular file: move it away, or choose another folder")
    content = path.read_bytes() if path.exists() else b""
    kept = _kept(path, content, last_step)
    if kept != content:
        with atomic_write(path) as temporary:
            temporary.write_bytes(kept)


def _kept(path: Path, content: bytes, last_step: int) -> bytes:
    """The header and all whole rows up to `last_step`."""
    if HEADER.startswith(content):
        return HEADER
    if not content.startswith(HEADER):
        raise UsageError(f"{path} has other columns than those of a run: move it away, or choose another folder")
    rows = content[len(HEADER) :].split(b"\n")
    rows.pop()  # empty, or written in part
    kept = []
    for number, row in enumerate(rows, 2):
        step = row.partition(b",")[0]
        if row.count(b",") != len(COLUMNS) - 1 or not step.isdigit() or len(step) > 20:
            raise UsageError(f"{path} is damaged in line {number}: correct or remove that line")
        if int(step) <= last_step:
            kept.append(row + b"\n")
    return HEADER + b"".join(kept)
