"""The tables in README.md and docs/ that come from the code and from stored results; `make tables` writes them."""

import textwrap
from pathlib import Path

import pandas as pd
from last_runs import count_outcomes

from triton_lstm.settings import ENVIRONMENT

RESULTS = Path(__file__).parents[1] / "perf" / "results"
PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "tf32": "TF32", "fp32": "float32"}
ALGORITHMS = {"PERSIST_STATIC": "persistent", "SMALL_H": "small H", "STANDARD": "standard"}
RECORDED = ("coverage", "fuzz")
MODES = {"inference": "inference", "forward": "forward", "forward_backward": "forward and backward"}


def environment() -> str:
    """The environment variables, of triton_lstm.settings."""
    rows = [(f"`{name}`", v.values, v.default, v.meaning) for name, v in ENVIRONMENT.items()]
    return _markdown(pd.DataFrame(rows, columns=["variable", "values", "default", "meaning"]))


def speedups(gpu: str) -> str:
    """Of each measured case, the speed of whole layers relative to nn.LSTM's; bold where it is not faster."""
    frame = _bench(gpu)
    ours = frame[frame.provider == "triton_lstm"].pivot(index="case", columns="mode", values="speedup")
    cases = frame[frame.provider == "nn.LSTM"].drop_duplicates("case").set_index("case")
    rows = [
        {
            "case": f"{PRECISIONS[case.precision]}, T={case['T']:.0f}, B={case.B:.0f}, H={case.H:.0f}",
            "algorithm of cuDNN": ALGORITHMS[case.algorithm.split(",")[0]],
            **{title: _speedup(ours.loc[name, mode]) for mode, title in MODES.items()},
        }
        for name, case in cases.iterrows()
    ]
    return _markdown(pd.DataFrame(rows))


def where_measured(gpu: str) -> str:
    """The GPU, versions and date of `speedups`."""
    row = _bench(gpu).iloc[0]
    cudnn = f"{row.cudnn // 10000:.0f}.{row.cudnn % 10000 // 100:.0f}"
    versions = f"torch {row.torch}, Triton {row.triton}, cuDNN {cudnn}"
    return f"{row.gpu}, {versions}, commit {row.commit}, {row.date[:10]}"


def how_fast(gpu: str) -> str:
    """A sentence with the least and the largest speedup."""
    frame = _bench(gpu)
    ours = frame[frame.provider == "triton_lstm"]
    least, most = ours.groupby("mode").speedup.min(), ours.groupby("mode").speedup.max()
    training, inference = (f"{least[mode]:.2g} to {most[mode]:.2g}" for mode in ("forward_backward", "inference"))
    text = (
        f"**How fast:** {training} times the speed of cuDNN's `nn.LSTM` in training, {inference} times in inference, "
        f"over the {frame.case.nunique()} cases measured on one {frame.gpu.iloc[0].split()[-1]}; the cases "
        "where it loses are [in the table](#how-fast)."
    )
    return textwrap.fill(text, 120)


def time_loops(gpu: str) -> str:
    """Of each measured shape in bfloat16, the time of a step with the best config, in microseconds."""
    frame = pd.read_csv(RESULTS / gpu / "time_loops.csv")
    frame = frame[(frame["dtype"] == "bf16") & (frame.kernels == "now")]
    best = frame.groupby(["H", "B", "direction"]).us.min().unstack("direction")[["forward", "backward"]]
    return _markdown(best.map("{:.1f}".format).reset_index())


def last_runs() -> str:
    """What each check said when it ran last: docs/last_runs.csv."""
    frame = pd.read_csv(Path(__file__).with_name("last_runs.csv"), dtype=str)
    on = "{date}, commit {commit}, Python {python}, torch {torch}, Triton {triton}"
    rows = []
    for check in RECORDED:
        of = frame[frame.check == check]
        figures = ", ".join(of.value + " " + of.figure) or "not run"
        rows.append(
            {"command": f"`make {check}`", "result": figures, "on": on.format_map(of.iloc[0]) if len(of) else ""}
        )
    return _markdown(pd.DataFrame(rows))


def gpu_tests() -> str:
    """The outcomes of the tests on each GPU, by commit."""
    rows = []
    for path in sorted(RESULTS.glob("*/gpu-test.csv")):
        frame = pd.read_csv(path)
        commits = frame.get("commit", pd.Series("not recorded", frame.index))
        for commit, group in frame.groupby(commits, sort=False):
            counts = {name: str(count) for name, count in count_outcomes(group).items()}
            rows.append({"GPU": path.parent.name.replace("_", " "), "commit": commit, **counts})
    return _markdown(pd.DataFrame(rows))


def _bench(gpu: str) -> pd.DataFrame:
    frame = pd.read_csv(RESULTS / gpu / "bench_quick.csv", low_memory=False)
    return frame[frame["mode"].isin(list(MODES)) & (frame.status == "ok")]


def _speedup(value: float) -> str:
    text = f"{value:.2f}" if value < 2 else f"{value:.1f}"
    return text if value > 1 else f"**{text}**"


def _markdown(frame: pd.DataFrame) -> str:
    return frame.to_markdown(index=False, disable_numparse=True)
