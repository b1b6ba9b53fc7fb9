"""Two sets of results, case by case, with the noise taken into account."""

from __future__ import annotations

from typing import Any

import pandas as pd

from triton_lstm.config import UsageError
from triton_lstm.perf.providers import OURS
from triton_lstm.perf.results import ALL_MODES, DEVICE, YARDSTICK, noise

Rows = dict[tuple[str, str, str], Any]
SLOWER, FASTER, SAME, LOST, NEW, NOT_RUN = "SLOWER", "faster", "same", "LOST", "new", "not run"
SAME_BASELINE = ["torch", "cudnn", "driver", "algorithm"]
REGRESSIONS = (SLOWER, LOST)


def compare(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """A row for each of triton_lstm's (case, provider, mode) in either: `ratio` (above 1 is slower), `noise`, verdict.

    Where both sets have the same nn.LSTM (SAME_BASELINE), times are taken relative to its time, so that a slower clock
    or a busy machine cancels out; `against` says so. LOST: there was a time, and now there is a reason why not.
    NOT_RUN: the second set does not have it at all. Raises UsageError for two devices, or nothing in common.
    """
    if sorted(set(before["gpu"])) != sorted(set(after["gpu"])):
        raise UsageError(
            f"{before['gpu'].iloc[0]} and {after['gpu'].iloc[0]} cannot be compared: measure on one device"
        )
    old, new = (_by_key(frame) for frame in (before, after))
    rows = []
    for case, provider, mode in old | new:
        if not provider.startswith(OURS):
            continue
        a, b = (_row(frame, case, provider, mode) for frame in (old, new))
        entry = {"case": case, "provider": provider, "mode": mode}
        was, is_now = (row is not None and row["status"] == "ok" for row in (a, b))
        if was and is_now:
            rows.append(entry | _judge(a, b, *(_row(frame, case, YARDSTICK, mode) for frame in (old, new))))
        elif was and b is None:
            rows.append(entry | {"verdict": NOT_RUN, "before_ms": a["ms"]})
        elif was:
            rows.append(entry | {"verdict": LOST, "before_ms": a["ms"], "reason": f"{b['status']}: {b['reason']}"})
        elif is_now:
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


def _judge(a: Any, b: Any, a_yardstick: Any, b_yardstick: Any) -> dict[str, object]:
    ratio, rows, against = b["ms"] / a["ms"], [a, b], "time"
    yardsticks = [row for row in (a_yardstick, b_yardstick) if row is not None and row["status"] == "ok"]
    if len(yardsticks) == 2 and all(yardsticks[0][name] == yardsticks[1][name] for name in SAME_BASELINE):
        ratio *= yardsticks[0]["ms"] / yardsticks[1]["ms"]
        rows += yardsticks
        against = YARDSTICK
    limit = noise(*rows)
    verdict = SLOWER if ratio > 1 + limit else FASTER if ratio < 1 / (1 + limit) else SAME
    times = {"before_ms": a["ms"], "after_ms": b["ms"], "against": against}
    return {"verdict": verdict, "ratio": ratio, "noise": limit} | times
