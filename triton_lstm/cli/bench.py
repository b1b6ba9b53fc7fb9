"""The commands bench, report and diff of `python -m triton_lstm`."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from triton_lstm.perf.cases import MODES, SUITES, Case
from triton_lstm.perf.watchdog import HANG_S, start_again, watched
from triton_lstm.settings import SHOWING, UsageError, device_for, dtype_name, require
from triton_lstm.system.terminal import print_table, say

if TYPE_CHECKING:
    import pandas as pd

    from triton_lstm.perf.bench import Wanted

DURATION = {
    "smoke": "the whole suite takes some minutes without a GPU",
    "quick": "the whole suite should take two minutes",
    "standard": "the whole suite should take eight minutes",
    "full": "the whole suite takes more than an hour",
}
Only = dict[str, list[str]]


def add_commands(commands: Any) -> None:
    """Adds bench, report and diff to the subparsers of the command line."""
    only = dict(action="append", type=_only, default=[], metavar="COLUMN=VALUE[,VALUE]")

    b = commands.add_parser("bench", help="benchmark triton_lstm against nn.LSTM and others; resumable")
    b.add_argument(
        "--suite",
        choices=list(SUITES),
        default="quick",
        help="default: quick; without a GPU only smoke runs, and shows no speeds",
    )
    b.add_argument("--only", **only, help="cases, providers or modes by column: H=512,768 provider=triton_lstm,nn.LSTM")
    b.add_argument("--out", type=Path, metavar="FOLDER", help="default: perf/results/<gpu>; runs/smoke without a GPU")
    b.add_argument("--retry", action="store_true", help="repeat what failed, was wrong or ran out of memory")
    b.set_defaults(run=bench)

    r = commands.add_parser("report", help="show stored results as table, Markdown, HTML and plots; needs no GPU")
    r.add_argument("path", type=Path, nargs="+", help="a CSV written by bench, or a folder of them")
    r.add_argument("--only", **only, help="select rows by any column")
    r.add_argument("--columns", metavar="NAME[,NAME]", help="print these columns and write nothing")
    r.add_argument("--out", type=Path, metavar="FOLDER", help="default: the folder of the results; none with --only")
    r.set_defaults(run=report)

    d = commands.add_parser("diff", help="compare two sets of results; exit 1 if triton_lstm became slower anywhere")
    d.add_argument("before", type=Path, help="a CSV written by bench, or a folder of them")
    d.add_argument("after", type=Path, help="the same, measured later")
    d.add_argument("--only", **only, help="select rows by any column")
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
    """Exit status 0, 1 if a result of triton_lstm was wrong or a measurement of it failed, 130 if interrupted."""
    gpu = torch.cuda.is_available()
    if not gpu and args.suite != "smoke":
        raise UsageError("PyTorch found no usable GPU; nothing was measured. Without one only --suite smoke runs")
    device = device_for()  # before the first import of a kernel
    require(*SHOWING, "filelock", "triton")
    import filelock

    from triton_lstm.perf.bench import all_combinations
    from triton_lstm.perf.failures import DeviceLostError
    from triton_lstm.perf.results import ALL_MODES, NOT_A_BENCHMARK, load, write_parquet
    from triton_lstm.perf.store import results_folder
    from triton_lstm.system.machine import NO_GPU

    wanted = choose(all_combinations(SUITES[args.suite]()), _by_column(args.only))
    folder = args.out or (results_folder() if gpu else Path("runs/smoke"))
    path = folder / f"bench_{args.suite}.csv"
    if not gpu:
        say(f"{NO_GPU}. {NOT_A_BENCHMARK}")
    say(f"{len(wanted)} rows to measure; {DURATION[args.suite]}. After Ctrl-C the same command resumes")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(path.with_suffix(".lock"), timeout=0), _log_to(path.with_suffix(".log")):
            finished = _measure(args, wanted, path, device)
    except filelock.Timeout:
        raise UsageError(f"another bench is writing {path}. Wait for it, or give another folder with --out") from None
    except DeviceLostError as lost:
        start_again(_restart_arguments(args), f"this process can no longer use the GPU ({lost})")
    if not finished:
        say(f"stopped; the results so far are in {path}, and the same command resumes")
        return 130
    frame = load([path])
    cases, modes = {case.name for case, _, _ in wanted}, {mode for _, _, mode in wanted} | {ALL_MODES, "floor"}
    chosen = frame[frame["case"].isin(cases) & frame["mode"].isin(modes)]
    _show(chosen, load([folder]), folder)
    parquet = f" and {path.with_suffix('.parquet').name}" if write_parquet(frame, path) else ""
    say(f"rows: {path}{parquet}")
    ours = frame[frame["provider"].str.startswith("triton_lstm")]
    return int(ours["status"].isin(["wrong", "failed"]).any())


def _measure(args: argparse.Namespace, wanted: list[Wanted], path: Path, device: torch.device) -> bool:
    """Whether the run finished; False after Ctrl-C, SIGTERM or SIGHUP."""
    from triton_lstm.perf.bench import run
    from triton_lstm.perf.store import Store
    from triton_lstm.system.machine import machine

    store = None
    try:
        store = Store(path, machine())
        if args.retry:
            for case, provider, mode in wanted:
                row = store.get(case.name, provider.name, mode)
                if row is not None and row["status"] not in ("ok", "skipped"):
                    store.measure_again(row)
        with watched(store.marker, lambda: start_again(_restart_arguments(args), f"no response for {HANG_S} s")):
            run(wanted, store, device)
    except KeyboardInterrupt:
        if store:
            store.save()
        return False
    finally:
        if store:
            store.end()  # the marker survives only a crash
    return True


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Logs failures with their tracebacks, and warnings."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.handleError = lambda record: None  # type: ignore[method-assign] # a full disk; the rows report it, too
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _restart_arguments(args: argparse.Namespace) -> list[str] | None:
    """The arguments for a new process that resumes after the marked measurement; --retry would start over."""
    if args.argv is None:
        return None
    command = ["bench", "--suite", args.suite]
    for column, values in args.only:
        command += ["--only", f"{column}={','.join(values)}"]
    return command + (["--out", str(args.out)] if args.out else [])


def choose(wanted: list[Wanted], only: Only) -> list[Wanted]:
    """The (case, provider, mode)s that match `only`, by the columns of case, provider and mode."""
    from triton_lstm.perf.providers import PROVIDERS
    from triton_lstm.perf.results import KEY, SHAPE, as_text

    for column, names in (("provider", PROVIDERS), ("mode", MODES)):
        for value in only.get(column, []):
            if value not in names:
                raise UsageError(f"unknown {column} {value!r}. Available: {', '.join(names)}")
    for column in only:
        if column not in (*KEY, *SHAPE):
            raise UsageError(f"cases have no column {column!r}. Available: {', '.join((*KEY, *SHAPE))}")

    def of(item: Wanted, column: str) -> str:
        case: Case = item[0]
        found = {"case": case.name, "provider": item[1].name, "mode": item[2]}
        return as_text(found[column] if column in found else getattr(case, column))

    found = [item for item in wanted if all(of(item, c) in [v.lower() for v in values] for c, values in only.items())]
    if not found:
        raise UsageError("--only matches no case of this suite. Relax it")
    return found


def report(args: argparse.Namespace) -> int:
    require(*SHOWING)
    from triton_lstm.perf.report import print_columns
    from triton_lstm.perf.results import load, select

    frame = select(load(args.path), _by_column(args.only))
    if frame.empty:
        raise UsageError("--only matches no row. Relax it")
    if args.columns is not None:
        print_columns(frame, args.columns.split(","))
        return 0
    first = args.path[0]
    folder = None if args.only else first if first.is_dir() else first.parent
    _show(frame, frame, args.out or folder)
    return 0


def _show(chosen: pd.DataFrame, frame: pd.DataFrame, folder: Path | None) -> None:
    """Prints the chosen rows, and writes the report of the whole frame to `folder` if one is given."""
    from triton_lstm.perf.report import print_summary, write_report
    from triton_lstm.perf.summary import summarize

    print_summary(summarize(chosen))
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    files = write_report(frame, summarize(frame), folder)
    say(f"written to {folder}: {', '.join(path.name for path in files)}")


def diff(args: argparse.Namespace) -> int:
    """Exit status 1 if triton_lstm is slower anywhere than noise explains, or has no time any more."""
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
    say("ratio: after / before, above 1 is slower; divided by nn.LSTM's where that is comparable.")
    say("; ".join(f"{verdict}: {count}" for verdict, count in counts.items()))
    return int(rows["verdict"].isin(REGRESSIONS).any())
