"""Reads metrics.csv, also while it is written, and damaged ones."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from triton_lstm.training.logs.metrics import COLUMNS


def read_logged(path: Path, columns: Sequence[str] = COLUMNS) -> tuple[dict[str, pd.Series], str | None]:
    """Reads metrics.csv.

    Args:
        path: the file.
        columns: which of its columns; fewer are read faster.

    Returns:
        By column, the values that were logged, NaN and infinity included, by step; of several at one step the last one.
        And what is missing or damaged, in one line; None if nothing is.
    """
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        return {}, f"{path.name}: {error.strerror}"
    content = content[: content.rfind(b"\n") + 1]  # without a row that is being written
    header, _, rows = content.partition(b"\n")
    names = header.decode(errors="replace").strip().split(",")
    if not rows:
        return {}, f"{path.name} is damaged" if content and "step" not in names else "no metrics yet"
    try:
        # usecols finds columns by name, and raises ValueError without a `step`
        return _series(*_parsed(content, ["step", *(name for name in names if name in columns and name != "step")]))
    except Exception:  # those of pandas' parser, its codecs and its conversions
        return {}, f"{path.name} is damaged"


def _parsed(content: bytes, names: list[str]) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """The columns as numbers; and as texts, if that makes a difference."""
    options: Any = dict(usecols=dict.fromkeys(names), index_col=False, quoting=csv.QUOTE_NONE)
    if b"nan" not in content:  # which would look like an empty cell
        try:
            return pd.read_csv(io.BytesIO(content), dtype=float, float_precision="round_trip", **options), None
        except ValueError:  # a cell that is no number, rows of different length, bytes that are no text
            pass
    texts = pd.read_csv(
        io.BytesIO(content), dtype=str, keep_default_na=False, on_bad_lines="skip", encoding_errors="replace", **options
    ).fillna("")
    return texts.apply(pd.to_numeric, errors="coerce").astype(float), texts


def _series(values: pd.DataFrame, texts: pd.DataFrame | None) -> tuple[dict[str, pd.Series], str | None]:
    there = values.notna() if texts is None else texts != ""
    steps = values["step"]
    whole = (steps >= 0) & (steps < 2**53) & (steps % 1 == 0)
    if texts is not None:
        whole &= ~(values.isna() & ~texts.isin(["", "nan"])).any(axis=1)
    logged = {}
    for name in values.columns.drop("step"):
        chosen = whole & there[name]
        series = pd.Series(values.loc[chosen, name].to_numpy(), steps[chosen].astype(np.int64).to_numpy(), name=name)
        if not series.index.is_unique:
            series = series[~series.index.duplicated(keep="last")]
        logged[name] = series if series.index.is_monotonic_increasing else series.sort_index()
    damaged = len(values) - int(whole.sum())
    return logged, f"metrics.csv: {damaged} damaged row{'s' * (damaged > 1)} left out" if damaged else None
