"""Figures of the last run of each check, for RELIABILITY.md: `pytest --record NAME` writes them.

With --cov, the share of branches among them, below BRANCHES of which a run fails.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from triton_lstm.system.machine import now

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docs" / "last_runs.csv"
BRANCHES = 95.0  # per cent, of branches alone: coverage's fail_under is for lines and branches together
FIELDS = ("check", "figure", "value", "date", "commit", "python", "torch", "triton")


def record(check: str, figures: Mapping[str, Any], path: Path = PATH) -> None:
    """Replaces the rows of a check, and leaves those of all others."""
    rows = [row for row in read(path) if row["check"] != check]
    about = dict(date=now()[:10], commit=_commit(), python=platform.python_version())
    about |= dict(torch=torch.__version__, triton=importlib.metadata.version("triton"))
    rows += [dict(check=check, figure=name, value=str(value), **about) for name, value in figures.items()]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["check"]))


def read(path: Path = PATH) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def count_outcomes(rows: pd.DataFrame) -> dict[str, int]:
    """How many tests passed, were skipped and failed, from what `pytest --csv` wrote."""
    found = rows.groupby("test")["outcome"].agg(set)
    failed = found.map(lambda outcomes: bool(outcomes & {"failed", "not collected"}))
    skipped = found.map(lambda outcomes: "skipped" in outcomes) & ~failed
    return {"passed": (~failed & ~skipped).sum(), "skipped": skipped.sum(), "failed": failed.sum()}


def _commit() -> str:
    """The commit, and whether anything but what is recorded has changed since."""
    git = ["git", "-C", str(ROOT)]
    changed = [
        *git,
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ".",
        ":!docs/last_runs.csv",
        ":!RELIABILITY.md",
    ]
    head, dirty = (
        subprocess.run(c, capture_output=True, text=True).stdout
        for c in ([*git, "rev-parse", "--short", "HEAD"], changed)
    )
    return (head.strip() or "unknown") + ("-dirty" if dirty else "")


class Recorder:
    """What came of all tests of a run; with pytest-xdist in the controller."""

    def __init__(self, check: str) -> None:
        self.check = check
        self.began = time.monotonic()

    def pytest_terminal_summary(self, terminalreporter: Any, exitstatus: int) -> None:
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return  # it was stopped, say
        counts: dict[str, Any] = {
            name: len(terminalreporter.stats.get(name, [])) for name in ("passed", "failed", "error", "skipped")
        }
        reports = [report for name in ("passed", "failed") for report in terminalreporter.stats.get(name, [])]
        values = [value for report in reports for name, value in report.user_properties if name == "calls"]
        if values:
            counts["random calls"] = sum(values)
        coverage = terminalreporter.config.pluginmanager.getplugin("_cov")  # pytest-cov's
        if total := getattr(coverage, "cov_total", None):
            counts["% of lines and branches"] = f"{total:.1f}"
            counts["% of branches"] = str(share_of_branches(coverage))
        record(self.check, {**counts, "minutes": f"{(time.monotonic() - self.began) / 60:.1f}"})


def share_of_branches(coverage: Any) -> float:
    """In per cent, of a run that pytest-cov's plugin `coverage` measured."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "coverage.json")
        coverage.cov_controller.cov.json_report(outfile=str(path), ignore_errors=True)
        totals = json.loads(path.read_text())["totals"]
    return round(100 * totals["covered_branches"] / totals["num_branches"], 1) if totals.get("num_branches") else 100.0


@pytest.hookimpl(wrapper=True, tryfirst=True)  # after pytest-cov has put the processes' data together
def pytest_runtestloop(session: pytest.Session) -> Generator[None, Any, Any]:
    result = yield
    coverage = session.config.pluginmanager.getplugin("_cov")
    if getattr(coverage, "cov_total", None) and coverage.options.cov_fail_under:  # --cov-fail-under=0 judges nothing
        share = share_of_branches(coverage)
        reporter = session.config.pluginmanager.getplugin("terminalreporter")
        reporter.write_line(f"\n{share}% of the branches were taken; {BRANCHES}% are required", red=share < BRANCHES)
        session.testsfailed += share < BRANCHES
    return result


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="NAME", help="write the number of tests by outcome to docs/last_runs.csv")


def pytest_configure(config: pytest.Config) -> None:
    if (name := config.getoption("--record")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(name))
