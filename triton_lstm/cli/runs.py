"""The command runs of `python -m triton_lstm`."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import difflib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_lstm.cli.common import check_plot, positive
from triton_lstm.settings import UsageError, require
from triton_lstm.system.terminal import escaped, print_table, say, spaced

if TYPE_CHECKING:
    import pandas as pd

    from triton_lstm.training.logs.runs import Run

NEEDED = ("tokens", "seconds", "loss", "tokens_per_s", "validation_loss", "bits_per_byte")  # of metrics.csv, for tables
LOSSES = ("loss", "validation_loss", "bits_per_byte")
OPTIONAL = {"time", "best_validation", "best_step", "bits_per_byte", "tokens_per_s"}  # left out of a narrow terminal
MANY = 10  # names in a note


def add_commands(commands: Any) -> None:
    """Adds runs to the subparsers of the command line."""
    r = commands.add_parser("runs", help="list and compare training runs; show one in detail")
    r.add_argument(
        "path", type=Path, nargs="*", default=[Path("runs")], help="runs, or folders of runs (default: runs)"
    )
    r.add_argument("--last", type=positive, metavar="N", help="only the last N by name: the newest")
    r.add_argument("--sort", metavar="COLUMN", help="sort by any column (default: run)")
    r.add_argument("--plot", type=Path, metavar="FILE", help="save the curves of the losses there, .png, .svg or .pdf")
    r.add_argument("--csv", action="store_true", help="print everything as CSV, with full precision")
    r.set_defaults(run=_runs)


def _runs(args: argparse.Namespace) -> int:
    require("pandas", "pydantic", "rich", "yaml", extra="train")
    if args.plot:
        from triton_lstm.training.logs.curves import SUFFIXES

        check_plot(args.plot, SUFFIXES)
    from triton_lstm.training.logs.metrics import COLUMNS
    from triton_lstm.training.logs.runs import find_runs, frame, read_run

    folders, others = find_runs(args.path)
    folders = folders[-args.last :] if args.last else folders
    detailed = len(folders) == 1 and not args.csv
    runs = [read_run(folder, COLUMNS if detailed else NEEDED) for folder in folders]
    table = frame(runs)
    if args.sort:
        table = _sorted(table, args.sort)
    if args.csv:
        _print_csv(_with_nan(table, runs))
    elif detailed:
        _print_details(runs[0], table)
    else:
        kept = set(table.columns) - OPTIONAL - (set() if table["note"].any() else {"note"})
        print_table(_readable(_with_nan(table, runs)), keep=kept)
    if others:
        names = ", ".join(str(folder) for folder in others[:MANY])
        more = f" and {len(others) - MANY} more" if len(others) > MANY else ""
        print(escaped(f"no runs, left out: {names}{more}"), file=sys.stderr)
    if args.plot:
        from triton_lstm.training.logs.curves import draw, save

        save(draw([runs[k] for k in table.index]), args.plot)
        print(escaped(f"figure: {args.plot}"), file=sys.stderr)
    return 0


def _sorted(table: pd.DataFrame, wanted: str) -> pd.DataFrame:
    """Numbers ascending, what is missing at the end. Raises UsageError for an unknown column."""
    known = {name.lower(): name for name in table.columns} | {"time": "seconds"}
    column = known.get(wanted.strip().lower().replace(" ", "_"))
    if column is None:
        near = difflib.get_close_matches(wanted.lower(), known, n=1)
        hint = f" Did you mean {known[near[0]]!r}?" if near else ""
        raise UsageError(f"runs have no column {wanted[:80]!r}.{hint} Available: {', '.join(table.columns)}")
    return table.sort_values(column, kind="stable")


def _with_nan(table: pd.DataFrame, runs: list[Run]) -> pd.DataFrame:
    """The table with a loss of NaN as text, which otherwise looks like one that was not logged."""
    from triton_lstm.training.logs.runs import last

    result = table.copy()
    for name in LOSSES:
        diverged = [k for k in table.index if len(runs[k].logged.get(name, ())) and math.isnan(last(runs[k], name))]
        if diverged:
            result[name] = result[name].astype(object)
            result.loc[diverged, name] = "nan"
    return result


def _readable(table: pd.DataFrame) -> pd.DataFrame:
    """With `steps` as 300/1000 and `seconds` as `time`, 1:02:03."""
    result = table.drop(columns="of").rename(columns={"seconds": "time"})
    result["steps"] = [_steps(row.steps, row.of) for row in table.itertuples()]
    result["time"] = [_time(seconds) for seconds in table["seconds"]]
    return result


def _steps(done: int, of: float) -> str:
    return f"{done}/{of:.0f}" if math.isfinite(of) else str(done)


def _time(seconds: float) -> str:
    if not 0 <= seconds < 1e10:
        return "" if math.isnan(seconds) else f"{seconds:g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _print_csv(table: pd.DataFrame) -> None:
    whole = table.astype({"of": "Int64", "best_step": "Int64"})
    texts = whole.select_dtypes(exclude="number").columns  # whose dtype depends on the version of pandas
    whole[texts] = whole[texts].map(lambda value: escaped(value) if isinstance(value, str) else value)
    print(whole.to_csv(index=False), end="")


def _print_details(run: Run, table: pd.DataFrame) -> None:
    """How far a run is, its configuration where it differs from the defaults, its versions, metrics and checkpoints."""
    import pandas as pd

    from triton_lstm.training.logs.runs import shown

    row = table.iloc[0]
    time = f", {took}" if (took := _time(row.seconds)) else ""
    say(f"{run.folder}: {_steps(row.steps, row.of)} steps{time}")
    if run.problem:
        say(run.problem)
    metrics = [
        {"": spaced(name), "last": "nan" if math.isnan(series.iloc[-1]) else series.iloc[-1], "step": series.index[-1]}
        for name, series in run.logged.items()
        if len(series)
    ]
    if math.isfinite(row.best_validation):
        metrics.append({"": "best validation", "last": row.best_validation, "step": int(row.best_step)})
    for title, rows in (
        ("configuration", _changed(run)),
        ("about", [{"": name, "value": shown(value)} for name, value in run.about.items()]),
        ("metrics", metrics),
        ("checkpoints", _checkpoints(run.folder)),
    ):
        if rows:
            print()
            print_table(pd.DataFrame(rows), title)


def _checkpoints(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for path in sorted((folder / "checkpoints").glob("*")):
        with contextlib.suppress(OSError):  # one that a run removes at this moment
            if (path / "state.json").is_file():
                found = [file.stat() for file in path.iterdir()]
                saved = datetime.datetime.fromtimestamp(max(file.st_mtime for file in found)).isoformat(" ", "seconds")
                rows.append({"": path.name, "MB": sum(file.st_size for file in found) / 1e6, "saved": saved})
    return rows


def _changed(run: Run) -> list[dict[str, str]]:
    """The values that are not the defaults on a GPU; what is None is not in the file."""
    from triton_lstm.training.config import Config, for_file
    from triton_lstm.training.logs.runs import shown

    defaults = for_file(Config())
    return [
        {"": name, "value": shown(value), "default": shown(defaults.get(name))}
        for name, value in run.config.items()
        if shown(value) != shown(defaults.get(name))
    ]
