"""Comparison of two sets of results, case by case, taking noise into account."""

from __future__ import annotations

from typing import Any

import pandas as pd

from triton_lstm.perf.providers import OURS
from triton_lstm.perf.results import ALL_MODES, BASELINE, DEVICE, noise
from triton_lstm.settings import UsageError

Rows = dict[tuple[str, str, str], Any]
SLOWER, FASTER, SAME, LOST, NEW, NOT_RUN = "SLOWER", "faster", "same", "LOST", "new", "not run"
SAME_BASELINE = ["torch", "cudnn", "driver", "algorithm"]
REGRESSIONS = (SLOWER, LOST)


def compare(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """A row per (case, provider, mode) of triton_lstm in either: `ratio` (above 1 is slower), `noise`, verdict.

    If both sets have the same nn.LSTM (SAME_BASELINE), times are relative to its time, so that a slower clock or a busy
    machine cancels out; `against` shows which. LOST: had a time, and now has a reason why not. NOT_RUN: missing from
    the second set. Raises UsageError for results of two devices, or without anything in common.
    """
    if sorted(set(before["gpu"])) != sorted(set(after["gpu"])):
        raise UsageError(
            f"{before['gpu'].iloc[0]} and {after['gpu'].iloc[0]} cannot be compared: measure both on one device"
        )
    old, new = (_by_key(frame) for frame in (before, after))
    rows = []
    for case, provider, mode in old | new:
        if not provider.startswith(OURS):
            continue
        a, b = (_row(frame, case, provider, mode) for frame in (old, new))
        entry = {"case": case, "provider": provider, "mode": mode}
        timed_before, timed_after = (row is not None and row["status"] == "ok" for row in (a, b))
        if timed_before and timed_after:
            rows.append(entry | _judge(a, b, *(_row(frame, case, BASELINE, mode) for frame in (old, new))))
        elif timed_before and b is None:
            rows.append(entry | {"verdict": NOT_RUN, "before_ms": a["ms"]})
        elif timed_before:
            rows.append(entry | {"verdict": LOST, "before_ms": a["ms"], "reason": f"{b['status']}: {b['reason']}"})
        elif timed_after:
            rows.append(entry | {"verdict": NEW, "after_ms": b["ms"]})
    columns = ["case", "provider", "mode", "verdict", "ratio", "noise", "before_ms", "after_ms", "against", "reason"]
    if all(row["verdict"] in (NEW, NOT_RUN) for row in rows):
        raise UsageError("the two have no case, provider and mode in common: nothing to compare")
    return pd.DataFrame(rows, columns=columns)


def _by_key(frame: pd.DataFrame) -> Rows:
    return {
        (row["case"], row["provider"], row["mode"]): row
        for row in frame[frame["provider"] != DEVICE].to_dict("records")
    }


def _row(rows: Rows, case: str, provider: str, mode: str) -> Any:
    return rows.get((case, provider, mode), rows.get((case, provider, ALL_MODES)))


def _judge(a: Any, b: Any, a_baseline: Any, b_baseline: Any) -> dict[str, object]:
    ratio, rows, against = b["ms"] / a["ms"], [a, b], "time"
    baselines = [row for row in (a_baseline, b_baseline) if row is not None and row["status"] == "ok"]
    if len(baselines) == 2 and all(baselines[0][name] == baselines[1][name] for name in SAME_BASELINE):
        ratio *= baselines[0]["ms"] / baselines[1]["ms"]
        rows += baselines
        against = BASELINE
    limit = noise(*rows)
    verdict = SLOWER if ratio > 1 + limit else FASTER if ratio < 1 / (1 + limit) else SAME
    times = {"before_ms": a["ms"], "after_ms": b["ms"], "against": against}
    return {"verdict": verdict, "ratio": ratio, "noise": limit} | times
