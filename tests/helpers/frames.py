"""Frames of results of a device that does not exist."""

import pandas as pd

from triton_lstm.perf.cases import Case
from triton_lstm.perf.results import FORMAT, derive, describe

ABOUT = dict(
    gpu="Imaginary 100", driver="1", torch="2", triton="3", cudnn="9", commit="abc", sources="f00", format=FORMAT
)
OURS, THEIRS = "triton_lstm", "nn.LSTM"
MODES = ("inference", "forward_backward")


def row(case, provider, mode, ms, spread=0.01, **more):
    times = dict(status="ok", ms=ms, p20=ms * (1 - spread), p80=ms * (1 + spread), runs=9, peak_mb=case.T * 0.5)
    algorithm = "STANDARD" if provider == THEIRS else ""
    base = describe(case, provider, mode, floor_ms=ms / 4) | times | {"algorithm": algorithm, "error_share": 0.5}
    return base | ABOUT | {"date": "2026-01-02T03:04:05+00:00", "reason": ""} | more


def make(speeds, cases=None, **more):
    """A frame of all cases x modes: ours takes 1 / speeds[k] of nn.LSTM's 2 ms on case k."""
    cases = cases or [Case("bf16", T=100 * 2**k, B=8, H=64 * 2 ** (k % 3), why="made up") for k in range(len(speeds))]
    rows = [
        row(case, provider, mode, 2.0 / (speed if provider == OURS else 1.0), **more)
        for case, speed in zip(cases, speeds, strict=True)
        for mode in MODES
        for provider in (OURS, THEIRS)
    ]
    floor = [
        dict(case="copy", provider="device", mode="floor", status="ok", reason="", gbs=4000.0),
        dict(case="matmul-bf16", provider="device", mode="floor", status="ok", reason="", tflops=700.0),
        dict(case="exchange-flag-16", provider="device", mode="floor", status="ok", reason="", us_per_step=0.8),
    ]
    return derive(pd.DataFrame(rows + [f | ABOUT | {"date": "2026-01-02"} for f in floor]))
