"""The commands bench, report and diff of `python -m triton_lstm`."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from triton_lstm.backend import device_for
from triton_lstm.config import SHOWING, UsageError, dtype_name, require
from triton_lstm.perf.cases import MODES, SUITES, Case
from triton_lstm.perf.watchdog import HANG_S, start_again, watched
from triton_lstm.terminal import print_table, say

if TYPE_CHECKING:
    import pandas as pd

    from triton_lstm.perf.bench import Wanted

TAKES = {
    "smoke": "the whole suite takes some minutes off a GPU",
    "quick": "the whole suite is meant to take two minutes",
    "standard": "the whole suite is meant to take eight minutes",
    "full": "the whole suite takes more than an hour",
}
Only = dict[str, list[str]]


def add_commands(commands: Any) -> None:
    """Adds bench, report and diff to the subparsers of the command line."""
    only = dict(action="append", type=_only, default=[], metavar="COLUMN=VALUE[,VALUE]")

    b = commands.add_parser("bench", help="measure triton_lstm beside nn.LSTM and others; continues where it stopped")
    b.add_argument(
        "--suite",
        choices=list(SUITES),
        default="quick",
        help="default: quick; off a GPU only smoke runs, and shows no speeds",
    )
    b.add_argument("--only", **only, help="cases, providers or modes by column: H=512,768 provider=triton_lstm,nn.LSTM")
    b.add_argument("--out", type=Path, metavar="FOLDER", help="default: perf/results/<gpu>; runs/smoke off a GPU")
    b.add_argument("--retry", action="store_true", help="measure again what failed, was wrong or out of memory")
    b.set_defaults(run=bench)

    r = commands.add_parser("report", help="show stored results again: table, Markdown, HTML, pictures; needs no GPU")
    r.add_argument("path", type=Path, nargs="+", help="a CSV that bench wrote, or a folder of them")
    r.add_argument("--only", **only, help="rows by any column")
    r.add_argument("--columns", metavar="NAME[,NAME]", help="print these columns and write nothing")
    r.add_argument("--out", type=Path, metavar="FOLDER", help="default: where the results lie; with --only, nowhere")
    r.set_defaults(run=report)

    d = commands.add_parser("diff", help="compare two sets of results; exit 1 if one of triton_lstm's is slower")
    d.add_argument("before", type=Path, help="a CSV that bench wrote, or a folder of them")
    d.add_argument("after", type=Path, help="the same, measured later")
    d.add_argument("--only", **only, help="rows by any column")
    d.set_defaults(run=diff)


def _only(text: str) -> tuple[str, list[str]]:
    column, equals, values = text.partition("=")
    if not (column and equals and values):
        raise argparse.ArgumentTypeError(f"must be COLUMN=VALUE[,VALUE], got {text!r}")
    names = values.split(",")
    return column, list(map(dtype_name, names)) if column == "precision" else names


def _by_column(pairs: list[tuple[str, list[str]]]) -> Only:
    only: Only = {}
    for column, values in pairs:
        only.setdefault(column, []).extend(values)
    return only


def bench(args: argparse.Namespace) -> int:
    """0; 1 where one of triton_lstm's answers was wrong or a measurement of it failed; 130 when interrupted."""
    gpu = torch.cuda.is_available()
    if not gpu and args.suite != "smoke":
        raise UsageError(
            "no GPU that PyTorch can use was found, and nothing was measured. Off a GPU only --suite smoke runs"
        )
    device = device_for()  # before the first import of a kernel
    require(*SHOWING, "filelock", "triton")
    import filelock

    from triton_lstm.perf.bench import everything
    from triton_lstm.perf.failures import DeviceLostError
    from triton_lstm.perf.machine import NO_GPU, results_folder
    from triton_lstm.perf.results import ALL_MODES, NO_SPEED, load, write_parquet

    wanted = choose(everything(SUITES[args.suite]()), _by_column(args.only))
    folder = args.out or (results_folder() if gpu else Path("runs/smoke"))
    path = folder / f"bench_{args.suite}.csv"
    if not gpu:
        say(f"{NO_GPU}. {NO_SPEED}")
    say(f"{len(wanted)} rows are wanted; {TAKES[args.suite]}. Ctrl-C stops it, and the same command continues")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(path.with_suffix(".lock"), timeout=0), _log_to(path.with_suffix(".log")):
            finished = _measure(args, wanted, path, device)
    except filelock.Timeout:
        raise UsageError(f"another bench is writing {path}. Wait for it, or give another folder with --out") from None
    except DeviceLostError as lost:
        start_again(_again(args), f"this process cannot go on with the GPU ({lost})")
    if not finished:
        say(f"stopped; what was measured is in {path}, and the same command continues from there")
        return 130
    frame = load([path])
    picked = {case.name for case, _, _ in wanted}, {mode for _, _, mode in wanted} | {ALL_MODES, "floor"}
    chosen = frame[frame["case"].isin(picked[0]) & frame["mode"].isin(picked[1])]
    _show(chosen, load([folder]), folder)
    parquet = f" and {path.with_suffix('.parquet').name}" if write_parquet(frame, path) else ""
    say(f"rows: {path}{parquet}")
    ours = frame[frame["provider"].str.startswith("triton_lstm")]
    return int(ours["status"].isin(["wrong", "failed"]).any())


def _measure(args: argparse.Namespace, wanted: list[Wanted], path: Path, device: torch.device) -> bool:
    """Whether the run came to its end; False after Ctrl-C, SIGTERM or SIGHUP."""
    from triton_lstm.perf.bench import run
    from triton_lstm.perf.machine import machine
    from triton_lstm.perf.store import Store

    store = None
    try:
        store = Store(path, machine())
        if args.retry:
            for case, provider, mode in wanted:
                row = store.get(case.name, provider.name, mode)
                if row is not None and row["status"] not in ("ok", "skipped"):
                    store.measure_again(row)
        with watched(store.marker, lambda: start_again(_again(args), f"no answer for {HANG_S} s")):
            run(wanted, store, device)
    except KeyboardInterrupt:
        if store:
            store.save()
        return False
    finally:
        if store:
            store.end()  # only a death leaves it
    return True


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Failures with their tracebacks, and warnings, of this run."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.handleError = lambda record: None  # type: ignore[method-assign] # a full disk; the rows say so too
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _again(args: argparse.Namespace) -> list[str] | None:
    """The arguments with which a fresh process goes on after what the marker names; --retry would begin anew."""
    if args.argv is None:
        return None
    command = ["bench", "--suite", args.suite]
    for column, values in args.only:
        command += ["--only", f"{column}={','.join(values)}"]
    return command + (["--out", str(args.out)] if args.out else [])


def choose(wanted: list[Wanted], only: Only) -> list[Wanted]:
    """The (case, provider, mode)s that `only` names, by the columns of the case, provider and mode."""
    from triton_lstm.perf.providers import PROVIDERS
    from triton_lstm.perf.results import KEY, SHAPE, as_text

    for column, names in (("provider", PROVIDERS), ("mode", MODES)):
        for value in only.get(column, []):
            if value not in names:
                raise UsageError(f"there is no {column} {value!r}. There are {', '.join(names)}")
    for column in only:
        if column not in (*KEY, *SHAPE):
            raise UsageError(f"cases have no column {column!r}. They have {', '.join((*KEY, *SHAPE))}")

    def of(item: Wanted, column: str) -> str:
        case: Case = item[0]
        found = {"case": case.name, "provider": item[1].name, "mode": item[2]}
        return as_text(found[column] if column in found else getattr(case, column))

    found = [item for item in wanted if all(of(item, c) in [v.lower() for v in values] for c, values in only.items())]
    if not found:
        raise UsageError("no case of this suite is left by --only. Leave some of it out")
    return found


def report(args: argparse.Namespace) -> int:
    require(*SHOWING)
    from triton_lstm.perf.report import print_columns
    from triton_lstm.perf.results import load, select

    frame = select(load(args.path), _by_column(args.only))
    if frame.empty:
        raise UsageError("no row is left by --only. Leave some of it out")
    if args.columns is not None:
        print_columns(frame, args.columns.split(","))
        return 0
    first = args.path[0]
    beside = None if args.only else first if first.is_dir() else first.parent
    _show(frame, frame, args.out or beside)
    return 0


def _show(chosen: pd.DataFrame, frame: pd.DataFrame, folder: Path | None) -> None:
    """The chosen rows in the terminal, and the whole frame's report in `folder` if one is given."""
    from triton_lstm.perf.report import print_summary, write_report
    from triton_lstm.perf.summary import summarize

    print_summary(summarize(chosen))
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    files = write_report(frame, summarize(frame), folder)
    say(f"written to {folder}: {', '.join(path.name for path in files)}")


def diff(args: argparse.Namespace) -> int:
    """1 if something of triton_lstm's is slower than the noise explains, or has lost its time."""
    require(*SHOWING)
    from triton_lstm.perf.diff import LOST, REGRESSIONS, compare
    from triton_lstm.perf.report import verdict_style
    from triton_lstm.perf.results import load, select

    only = _by_column(args.only)
    rows = compare(*(select(load([path]), only) for path in (args.before, args.after)))
    for provider, found in rows.drop(columns="reason").groupby("provider", sort=False):
        keep = ["case", "mode", "verdict"]
        print_table(found.drop(columns="provider"), str(provider), keep=keep, style=verdict_style)
    lost = rows.loc[rows["verdict"] == LOST, ["case", "provider", "mode", "reason"]]
    if len(lost):
        print_table(lost, "LOST, and why", keep=["case", "mode", "reason"])
    counts = rows["verdict"].value_counts()
    say("ratio: after / before, above 1 is slower; divided by nn.LSTM's where that is the same in both.")
    say("; ".join(f"{verdict}: {count}" for verdict, count in counts.items()))
    return int(rows["verdict"].isin(REGRESSIONS).any())
