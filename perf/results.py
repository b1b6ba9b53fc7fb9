"""Results as one tidy frame in one CSV: a row per (case, provider, mode), and per floor of the device."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from triton_lstm.perf.cases import WORKING, Case
from triton_lstm.perf.work import flops, least_bytes
from triton_lstm.settings import UsageError

FORMAT = 1
KEY = ["case", "provider", "mode"]
SHAPE = [field.name for field in dataclasses.fields(Case) if field.name not in ("modes", "why")]
MACHINE = ["gpu", "driver", "torch", "triton", "cudnn", "commit", "sources"]
MEASURED = ["status", "reason", "algorithm", "ms", "p20", "p80", "runs", "peak_mb", "error", "error_share", "clock_mhz"]
WORK = ["flops", "bytes", "floor_ms"]
DERIVED = ["us_per_step", "tflops", "gbs", "floor_share", "speedup"]
COLUMNS = KEY + MEASURED + DERIVED + WORK + SHAPE + ["why"] + MACHINE + ["date", "format"]
FLAGS = ["bidirectional", "batch_first", "packed"]
STATUS = ["ok", "wrong", "failed", "out of memory", "unchecked", "skipped"]
TEXT = {*KEY, "status", "reason", "algorithm", "precision", "why", *MACHINE, "date"}
BASELINE = "nn.LSTM"
ALL_MODES = "all"  # the mode of a row with the reason why a provider was not measured
LEAST_NOISE = 0.03  # smaller differences never count
NOISE_OF_ONE_CALL = 0.5  # a cold start is timed once, and reads from disk
NOT_A_BENCHMARK = "These times are NOT A BENCHMARK."
DEVICE = "device"  # the provider of the floors' rows
HELP = {
    "status": "ok; otherwise wrong, failed, out of memory, unchecked or skipped, without a time: see `reason`",
    "algorithm": "of nn.LSTM: the one that PyTorch requests from cuDNN",
    "ms, p20, p80": "median and quantiles of `runs` calls, in milliseconds",
    "us_per_step": "ms divided by T, in microseconds",
    "tflops, gbs": "operations and minimal traffic of the case (perf/work.py) divided by the time",
    "floor_ms, floor_share": "a lower bound estimated from measured parts (perf/work.py); as a fraction of ms",
    "speedup": "nn.LSTM's time (with resets: split and packed) divided by this one, same case and mode",
    "peak_mb": "peak memory in addition to inputs and weights, in 2**20 bytes",
    "error, error_share": "largest relative RMS error against float64; worst error divided by the allowed one",
    "clock_mhz": "SM clock, read right after the case's first mode",
}


def describe(case: Case, provider: str, mode: str, floor_ms: float) -> dict[str, Any]:
    """The columns of a row that are known before the measurement."""
    work = {"flops": flops(case, mode), "bytes": least_bytes(case, mode)} if mode in WORKING else {}
    shape = {name: getattr(case, name) for name in SHAPE}
    return {"case": case.name, "provider": provider, "mode": mode, "why": case.why, "floor_ms": floor_ms} | work | shape


def derive(frame: pd.DataFrame) -> pd.DataFrame:
    """Adds the derived columns, and sorts all columns."""
    frame = frame.reindex(columns=COLUMNS)
    for name in TEXT:
        frame[name] = frame[name].astype(object).fillna("")
    frame["resets"] = pd.to_numeric(frame["resets"])  # not objects where all are None
    measured = frame["provider"] != DEVICE
    yardstick = frame[(frame["provider"] == BASELINE) & (frame["status"] == "ok")].set_index(["case", "mode"])["ms"]
    pairs = pd.MultiIndex.from_frame(frame[["case", "mode"]])
    ms = pd.to_numeric(frame["ms"])
    values = {
        "us_per_step": (ms * 1e3 / frame["T"].astype(float)).where(frame["mode"].isin(WORKING)),
        "tflops": frame["flops"].astype(float) / ms / 1e9,
        "gbs": frame["bytes"].astype(float) / ms / 1e6,
        "floor_share": frame["floor_ms"].astype(float) / ms,
        "speedup": yardstick.reindex(pairs).to_numpy() / ms,
    }
    for name, value in values.items():
        frame[name] = frame[name].astype(float).where(~measured, value)
    return frame


def write(frame: pd.DataFrame, path: Path) -> None:
    """Replaces the CSV atomically."""
    target = path.resolve()  # keeps symbolic links
    temporary = target.with_suffix(".tmp")
    frame.to_csv(temporary, index=False, float_format="%.6g")
    os.replace(temporary, target)


def write_parquet(frame: pd.DataFrame, path: Path) -> bool:
    """Writes a Parquet file next to the CSV `path`; False if pyarrow is not installed."""
    try:
        frame.to_parquet(path.with_suffix(".parquet"), engine="pyarrow", index=False)
    except ImportError:
        return False
    return True


def load(paths: Iterable[Path]) -> pd.DataFrame:
    """The rows of CSV files, or of all bench_*.csv in folders; if several files have a key, the latest measurement.

    Raises UsageError for other files, and for results of several devices.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("bench_*.csv")) if path.is_dir() else [path]
        if not found:
            raise UsageError(f"{path} contains no bench_*.csv. Run `bench` first, or give a results file")
        files += found
    read = [_read(path) for path in files]
    gpus = sorted({gpu for frame in read for gpu in frame["gpu"]})
    if len(gpus) > 1:
        raise UsageError(f"these are results of {' and of '.join(map(repr, gpus))}. Give those of one device")
    # Per file: a speedup relates two times of the same run
    rows = pd.concat([derive(_latest(frame)) for frame in read], ignore_index=True)
    return _latest(rows).reset_index(drop=True)


def _latest(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values("date", kind="stable").drop_duplicates(KEY, keep="last").sort_index()


def _read(path: Path) -> pd.DataFrame:
    """One CSV, validated."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a file. Give a CSV written by `bench`")
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
    except (OSError, ValueError, pd.errors.ParserWarning) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else "not a CSV"
        raise UsageError(f"{path} cannot be read ({what}). Give a CSV written by `bench`") from None
    if "format" not in frame.columns:
        raise UsageError(f"{path} is not a results file: it has no column `format`. Give a CSV written by `bench`")
    formats = sorted(set(frame["format"]) - {str(FORMAT)})
    if formats:
        raise UsageError(f"{path} has format {formats[0]!r}, but this version reads format {FORMAT}. Measure again")
    if "resets" not in frame.columns:
        frame["resets"] = ""  # of an older version, whose cases had none
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise UsageError(f"{path} lacks the column {missing[0]}. Give a CSV written by `bench`")
    if frame.empty:
        raise UsageError(f"{path} has no rows. Run `bench` first, or give another file")
    return _typed(frame, path)


def _typed(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Converts text to numbers and booleans. Raises UsageError for a cell that `bench` cannot have written."""

    def refuse(name: str, bad: pd.Series) -> None:
        if bad.any():
            row = bad.idxmax()
            raise UsageError(f"{path}, line {row + 2}: {name} cannot be {frame.loc[row, name]!r}. Is the file damaged?")

    typed = frame.copy()
    refuse("status", ~frame["status"].isin(STATUS))
    for name in FLAGS:
        refuse(name, ~frame[name].isin(["True", "False", ""]))
        typed[name] = frame[name].map({"True": True, "False": False, "": None})
    for name in COLUMNS:
        if name not in TEXT and name not in FLAGS:
            typed[name] = pd.to_numeric(frame[name], errors="coerce")
            refuse(name, typed[name].isna() & (frame[name] != "") | typed[name].isin([math.inf, -math.inf]))
    timed = (frame["status"] == "ok") & (frame["provider"] != DEVICE)
    refuse("ms", timed & ~(typed["ms"] > 0))
    refuse("p20", timed & ~((typed["p20"] > 0) & (typed["p20"] <= typed["ms"])))
    refuse("p80", timed & ~(typed["p80"] >= typed["ms"]))
    refuse("runs", timed & ~(typed["runs"] >= 1))
    refuse("T", timed & ~(typed["T"] >= 1))
    return typed


def noise(*rows: Any) -> float:
    """The relative uncertainty of a ratio of the rows' times: twice the root of the sum of their squared spreads (half
    of p20 to p80); at least LEAST_NOISE, or NOISE_OF_ONE_CALL if one was timed once."""
    least = LEAST_NOISE if min(row["runs"] for row in rows) > 1 else NOISE_OF_ONE_CALL
    return max(least, 2 * math.sqrt(sum(((row["p80"] - row["p20"]) / 2 / row["ms"]) ** 2 for row in rows)))


def select(frame: pd.DataFrame, only: dict[str, list[str]]) -> pd.DataFrame:
    """The rows whose columns have one of the given values (as text). Raises UsageError for an unknown column."""
    for name, values in only.items():
        if name not in frame.columns:
            raise UsageError(f"there is no column {name!r}. Available: {', '.join(COLUMNS)}")
        frame = frame[frame[name].map(as_text).isin([value.lower() for value in values])]
    return frame


def as_text(value: Any) -> str:
    """A value as written on the command line: 512, not 512.0; true, not True; none, not NaN."""
    if value is None or value != value:
        return "none"
    return f"{value:.12g}" if isinstance(value, float) else str(value).lower()
