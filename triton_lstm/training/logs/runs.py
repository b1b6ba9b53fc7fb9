"""The folders of training runs, as they are read: configurations, metrics, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from triton_lstm.settings import UsageError, require
from triton_lstm.training.logs import metrics
from triton_lstm.training.logs.logged import read_logged

CONFIG, ABOUT = "config.yaml", "about.yaml"
LARGEST_YAML = 1 << 20  # bytes; the parser takes about a second for so many
COLUMNS = (  # of a frame, besides the configuration
    "run",
    "steps",
    "of",
    "seconds",
    "loss",
    "validation_loss",
    "best_validation",
    "best_step",
    "bits_per_byte",
    "tokens_per_s",
    "note",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes:
        folder: where it is.
        config: the values of its configuration, by name; empty if they cannot be read.
        about: what else is known about it, such as its versions, and when it was resumed.
        logged: by column of metrics.csv the values that were logged, NaN and infinity included, by step.
        problem: what is missing or damaged, in one line; None if nothing is.
    """

    folder: Path
    config: dict[str, Any]
    about: dict[str, Any]
    logged: dict[str, pd.Series]
    problem: str | None

    @property
    def name(self) -> str:
        return os.path.basename(os.path.abspath(self.folder))

    @property
    def metrics(self) -> pd.DataFrame:
        """One row per step, one column per quantity; NaN also where nothing was logged, unlike in `logged`."""
        return pd.DataFrame(self.logged)


def find_runs(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[Path], list[Path]]:
    """Finds the runs among `paths`, which are runs and folders of runs.

    Returns:
        The runs, sorted by name, so the newest is the last one; and the other folders next to them.

    Raises:
        UsageError: for a path that is neither.
    """
    runs: dict[str, Path] = {}
    others = []
    for path in map(Path, paths):
        if not path.exists():
            raise UsageError(f"{path} does not exist. Train first, or give the folder of your runs")
        if not path.is_dir():
            raise UsageError(f"{path} is not a folder. Give a run, or a folder of runs")
        inside = [path] if _is_run(path) else sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] != ".")
        found = [folder for folder in inside if _is_run(folder)]
        if not found:
            raise UsageError(f"{path} contains no run of `train`. Train first, or give the folder of your runs")
        others += [folder for folder in inside if folder not in found]
        runs |= {os.path.realpath(folder): folder for folder in found}
    return sorted(runs.values(), key=lambda folder: (os.path.basename(os.path.abspath(folder)), folder)), others


def _is_run(folder: Path) -> bool:
    return any(os.path.isfile(folder / name) for name in (CONFIG, metrics.FILE))


def read_run(folder: str | os.PathLike[str], columns: Sequence[str] = metrics.COLUMNS) -> Run:
    """Reads a run, and says in its `problem` what could not be read.

    Args:
        folder: the run's.
        columns: of metrics.csv; only these are read, and the steps.
    """
    folder = Path(folder)
    problems: list[str] = []
    config = {str(name): _plain(value) for name, value in _read_yaml(folder / CONFIG, problems).items()}
    # its absence is no problem: nothing depends on it
    about = _read_yaml(folder / ABOUT, problems) if os.path.lexists(folder / ABOUT) else {}
    if isinstance(later := about.get("resumed"), list):
        about["resumed"] = [start.get("started") for start in later if isinstance(start, dict)]
    logged, problem = read_logged(folder / metrics.FILE, columns)
    problems += [problem] if problem else []
    return Run(
        folder=folder,
        config=config,
        about={str(name): _plain(value) for name, value in about.items()},
        logged=logged,
        problem="; ".join(problems) or None,
    )


def _read_yaml(path: Path, problems: list[str]) -> dict[Any, Any]:
    require("yaml", extra="train")
    import yaml

    try:
        if not path.is_file():
            problems.append(f"no {path.name}")
        elif path.stat().st_size > LARGEST_YAML:
            problems.append(f"{path.name} is too large")
        elif isinstance(content := yaml.safe_load(path.read_bytes()), dict):
            return content
        else:
            problems.append(f"{path.name} is {'empty' if content is None else 'damaged'}")
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror}")
    except Exception:  # safe_load raises many more than YAMLError: ValueError, RecursionError, AttributeError, ...
        problems.append(f"{path.name} is damaged")
    return {}


def _plain(value: Any) -> Any:
    """A scalar, or a flat list of them; anything else, which a configuration does not contain, as "..."."""
    if isinstance(value, list | tuple):
        return [_plain(item) if not isinstance(item, list) else "..." for item in value]
    if isinstance(value, datetime.date):
        return value.isoformat()
    return value if value is None or isinstance(value, str | bool | int | float) else "..."


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The configuration's values that differ between runs: by name, one per run, None where it is unknown.

    The number of steps is left out: how many a run has done matters more.
    """
    known = [run.config for run in runs if run.config]
    names = dict.fromkeys(name for config in known for name in config)
    names.pop("steps", None)
    found = {}
    for name in names:
        if len({shown(config.get(name)) for config in known}) > 1:
            found[f"config.{name}" if name in COLUMNS else name] = [run.config.get(name) for run in runs]
    return found


def shown(value: Any) -> str:
    """A value of a configuration as text."""
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def frame(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per run, with what its metrics come to, and the values of its configuration that others do not share.

    Columns:
        run: its name, or its path if another one has the same name.
        steps, of: how many are done, and to be done.
        seconds: trained so far.
        loss, validation_loss, bits_per_byte: the last ones, NaN and infinity included.
        best_validation, best_step: the lowest finite validation loss, and its step.
        tokens_per_s: the median.
        the names of `differing`: numbers, or texts.
        note: what is missing or damaged.
    """
    names = [run.name for run in runs]
    rows = []
    for run, name in zip(runs, names, strict=True):
        validation = run.logged.get("validation_loss", pd.Series(dtype=float))
        finite = validation[np.isfinite(validation)]
        rows.append(
            {
                "run": name if names.count(name) == 1 else str(run.folder),
                "steps": max((series.index[-1] for series in run.logged.values() if len(series)), default=0),
                "of": _number(run.config.get("steps")),
                "seconds": last(run, "seconds"),
                "loss": last(run, "loss"),
                "validation_loss": last(run, "validation_loss"),
                "best_validation": finite.min(),
                "best_step": finite.idxmin() if len(finite) else np.nan,
                "bits_per_byte": last(run, "bits_per_byte"),
                "tokens_per_s": run.logged["tokens_per_s"].median() if "tokens_per_s" in run.logged else np.nan,
                "note": run.problem or "",
            }
        )
    found = pd.DataFrame(rows, columns=list(COLUMNS))
    for name, values in differing(runs).items():
        values = [value if run.config else np.nan for run, value in zip(runs, values, strict=True)]
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        texts = [shown(value) if run.config else None for run, value in zip(runs, values, strict=True)]
        column = pd.to_numeric(pd.Series(values, dtype=object)) if numeric else pd.Series(texts, dtype=object)
        found.insert(len(found.columns) - 1, name, column)
    return found


def last(run: Run, name: str) -> float:
    """The last value of a column that was logged, NaN and infinity included; NaN if there is none."""
    series = run.logged.get(name, ())
    return float(series.iloc[-1]) if len(series) else np.nan


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int) and abs(value) < 2**53 else np.nan
