"""The summary of a frame of results: a row per case and mode, ours against nn.LSTM, wins and losses alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from triton_lstm.perf.providers import OURS, PROVIDERS
from triton_lstm.perf.results import ALL_MODES, BASELINE, DEVICE, NOT_A_BENCHMARK, noise
from triton_lstm.perf.split import SPLIT
from triton_lstm.system.machine import NO_GPU

WINS, EVEN, LOSES = "wins", "even", "LOSES"


@dataclasses.dataclass(frozen=True)
class Summary:
    """headline: sentences. table: ours against nn.LSTM. all_times: the times of all providers. unmeasured: those
    without a time, and why. floor: the device's measured floor. providers: a description of each.
    """

    headline: list[str]
    table: pd.DataFrame
    all_times: pd.DataFrame
    unmeasured: pd.DataFrame
    floor: pd.DataFrame
    providers: pd.DataFrame


def verdict(ours: Any, theirs: Any) -> str:
    """Which of two measured rows is faster; "even" if noise could explain the difference."""
    limit = 1 + noise(ours, theirs)
    ratio = theirs["ms"] / ours["ms"]
    return WINS if ratio > limit else LOSES if ratio < 1 / limit else EVEN


def summarize(frame: pd.DataFrame) -> Summary:
    """All tables of a frame of results."""
    rows = frame[frame["provider"] != DEVICE]
    table = _table(rows)
    if NO_GPU in set(frame["gpu"]):
        table = table.assign(verdict=table["verdict"].replace([WINS, EVEN, LOSES], "not a benchmark"), speedup=math.nan)
    return Summary(_headline(frame, table), table, _all_times(rows), _unmeasured(rows), _floor(frame), _providers(rows))


def _table(rows: pd.DataFrame) -> pd.DataFrame:
    found = []
    reasons = rows[rows["status"] != "ok"].set_index(["case", "provider", "mode"])
    for (case, mode), group in _pairs(rows):
        measured = {row["provider"]: row for _, row in group[group["status"] == "ok"].iterrows()}
        ours, theirs = measured.get(OURS), measured.get(BASELINE)
        entry: dict[str, Any] = {"case": case, "mode": mode, "verdict": ""}
        if ours is not None and theirs is not None:
            together = ours["speedup"] == ours["speedup"]  # NaN: nn.LSTM was measured in another run
            entry["verdict"] = verdict(ours, theirs) if together else "nn.LSTM was measured in another run"
        elif ours is None:
            entry["verdict"] = _why(reasons, case, OURS, mode)
        else:
            entry["verdict"] = f"nn.LSTM {_why(reasons, case, BASELINE, mode)}"
        for row, prefix in ((ours, ""), (theirs, "nn.LSTM ")):
            for column in ("ms", "us_per_step", "peak_mb"):
                entry[prefix + column] = math.nan if row is None else row[column]
        entry["nn.LSTM algorithm"] = "" if theirs is None else theirs["algorithm"]
        for column in ("speedup", "floor_share", "error_share"):
            entry[column] = math.nan if ours is None else ours[column]
        found.append(entry)
    columns = ["case", "mode", "verdict", "speedup", "ms", "nn.LSTM ms", "nn.LSTM algorithm", "us_per_step"]
    columns += ["nn.LSTM us_per_step", "floor_share", "peak_mb", "nn.LSTM peak_mb", "error_share"]
    return pd.DataFrame(found, columns=columns)


def _pairs(rows: pd.DataFrame) -> Any:
    """(case, mode) and its rows, in file order; a case without any time has the single mode "all"."""
    measured = rows[rows["mode"] != ALL_MODES]
    unmeasured = rows[(rows["mode"] == ALL_MODES) & ~rows["case"].isin(measured["case"])]
    return pd.concat([measured, unmeasured]).groupby(["case", "mode"], sort=False)


def _why(reasons: pd.DataFrame, case: str, provider: str, mode: str) -> str:
    for key in ((case, provider, mode), (case, provider, ALL_MODES)):
        if key in reasons.index:
            row = reasons.loc[[key]].iloc[0]
            return f"{row['status']}: {row['reason']}"
    return "not measured"


def _all_times(rows: pd.DataFrame) -> pd.DataFrame:
    measured = rows[rows["status"] == "ok"]
    if measured.empty:
        return pd.DataFrame()
    table = measured.pivot_table(index=["case", "mode"], columns="provider", values="ms", sort=False)
    names = _in_order(table.columns)
    return table[names].rename(columns=lambda name: f"{name}, ms").reset_index()


def _unmeasured(rows: pd.DataFrame) -> pd.DataFrame:
    bad = rows[rows["status"] != "ok"]
    table = bad.groupby(["provider", "status", "reason"], sort=False)["case"].agg(["nunique", "first"]).reset_index()
    return table.rename(columns={"nunique": "cases", "first": "example"})


def _floor(frame: pd.DataFrame) -> pd.DataFrame:
    columns = ["case", "status", "us_per_step", "gbs", "tflops", "reason"]
    return frame.loc[frame["provider"] == DEVICE, columns].dropna(axis=1, how="all")


def _headline(frame: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    if frame.empty:
        return ["Nothing was measured."]
    lines = []
    for _, about in frame[["gpu", "driver", "torch", "triton", "cudnn", "commit"]].drop_duplicates().iterrows():
        cudnn = f", cuDNN {about['cudnn']}" if about["cudnn"] else ""
        driver = f", driver {about['driver']}" if about["driver"] else ""
        lines.append(
            f"{about['gpu']}{driver}; torch {about['torch']}, triton {about['triton']}{cudnn}; "
            f"commit {about['commit']}; {frame['date'].min()} to {frame['date'].max()}."
        )
    if NO_GPU in set(frame["gpu"]):
        return [*lines, NOT_A_BENCHMARK]
    counts = table["verdict"].value_counts()
    compared = sum(int(counts.get(name, 0)) for name in (WINS, EVEN, LOSES))
    lines.append(
        f"Of {len(table)} (case, mode) pairs {OURS} wins {counts.get(WINS, 0)}, is even in {counts.get(EVEN, 0)} and "
        f"loses {counts.get(LOSES, 0)} against nn.LSTM; {len(table) - compared} cannot be compared."
    )
    for mode, group in table.dropna(subset=["speedup"]).groupby("mode", sort=False):
        mean = math.exp(group["speedup"].map(math.log).mean())
        lines.append(
            f"{mode}: {mean:.3g} times nn.LSTM's speed, {group['speedup'].min():.3g} to {group['speedup'].max():.3g} "
            f"(geometric mean of {len(group)} case{'s' if len(group) > 1 else ''})."
        )
    if frame["resets"].notna().any():
        lines.append(f"nn.LSTM has no resets: where a case has them, {SPLIT}.")
    return lines


def _in_order(names: Iterable[str]) -> list[str]:
    """Known providers in order, then those of other versions."""
    found = list(dict.fromkeys(names))
    return [name for name in PROVIDERS if name in found] + [name for name in found if name not in PROVIDERS]


def _providers(rows: pd.DataFrame) -> pd.DataFrame:
    about = {name: PROVIDERS[name].about if name in PROVIDERS else "" for name in _in_order(rows["provider"])}
    return pd.DataFrame(about.items(), columns=["provider", "description"])
