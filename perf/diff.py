"""Two sets of results, case by case, with the noise taken into account."""

from __future__ import annotations

import math

import pandas as pd

from triton_lstm.config import UsageError
from triton_lstm.perf.providers import OURS
from triton_lstm.perf.results import DEVICE, KEY, YARDSTICK

LEAST_NOISE = 0.03  # two runs of the same code differ by as much
NOISE_OF_ONE_CALL = 0.5  # a cold start is timed once, and has a disk in it
SLOWER, FASTER, SAME, LOST, NEW = "SLOWER", "faster", "same", "LOST", "new"
REGRESSIONS = (SLOWER, LOST)


def compare(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """A row for each of triton_lstm's (case, provider, mode) in either: `ratio` (above 1 is slower), `noise`, verdict.

    Where both sets have nn.LSTM's time too, times are taken relative to it, so that a slower clock or a busy machine
    cancels out; `against` says so. noise: twice the spread (half of p20 to p80, relative, of all times involved, added
    as squares), at least 3%, and 50% for what was timed once. LOST: there was a time and now there is none; what was
    not run at all is left out.
    """
    if sorted(set(before["gpu"])) != sorted(set(after["gpu"])):
        raise UsageError(
            f"{before['gpu'].iloc[0]} and {after['gpu'].iloc[0]} cannot be compared: measure on one device"
        )
    old, new = (frame[frame["provider"] != DEVICE].set_index(KEY) for frame in (before, after))
    rows = []
    for case, provider, mode in old.index.union(new.index, sort=False):
        if not provider.startswith(OURS):
            continue
        a, b = (_row(frame, case, provider, mode) for frame in (old, new))
        if b is None or (a is None and b["status"] != "ok"):
            continue
        entry = {"case": case, "provider": provider, "mode": mode}
        was, is_now = (row is not None and row["status"] == "ok" for row in (a, b))
        if was and is_now:
            rows.append(entry | _judge(a, b, *(_row(frame, case, YARDSTICK, mode) for frame in (old, new))))
        elif was:
            rows.append(entry | {"verdict": LOST, "reason": f"{b['status']}: {b['reason']}"})
        elif is_now:
            rows.append(entry | {"verdict": NEW, "after_ms": b["ms"]})
    columns = ["case", "provider", "mode", "verdict", "ratio", "noise", "before_ms", "after_ms", "against", "reason"]
    if all(row["verdict"] == NEW for row in rows):
        raise UsageError("the two have no case, provider and mode in common: nothing to compare")
    return pd.DataFrame(rows, columns=columns)


def _row(frame: pd.DataFrame, case: str, provider: str, mode: str) -> pd.Series | None:
    for key in ((case, provider, mode), (case, provider, "all")):
        if key in frame.index:
            return frame.loc[[key]].iloc[-1]
    return None


def _judge(
    a: pd.Series, b: pd.Series, a_yardstick: pd.Series | None, b_yardstick: pd.Series | None
) -> dict[str, object]:
    ratio, spreads, against = b["ms"] / a["ms"], [a, b], "time"
    yardsticks = [row for row in (a_yardstick, b_yardstick) if row is not None and row["status"] == "ok"]
    if len(yardsticks) == 2:
        ratio *= yardsticks[0]["ms"] / yardsticks[1]["ms"]
        spreads += yardsticks
        against = YARDSTICK
    least = LEAST_NOISE if min(row["runs"] for row in spreads) > 1 else NOISE_OF_ONE_CALL
    noise = max(least, 2 * math.sqrt(sum(((row["p80"] - row["p20"]) / 2 / row["ms"]) ** 2 for row in spreads)))
    verdict = SLOWER if ratio > 1 + noise else FASTER if ratio < 1 / (1 + noise) else SAME
    times = {"before_ms": a["ms"], "after_ms": b["ms"], "against": against}
    return {"verdict": verdict, "ratio": ratio, "noise": noise} | times
