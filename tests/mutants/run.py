"""Mutation testing, `make mutants`: which changes of the code do the tests not notice, and why?

Two packages make the changes, in clones of the last commit in build/mutants, where a run that was stopped goes on, and
one after new tests tries what nothing had noticed:

mutmut      changes functions without decorators and forks for each mutant: pyproject.toml has its files and tests
cosmic-ray  changes whole files, Triton's kernels among them, and starts Python for each mutant: cosmic_ray.toml

The reasons of all that is not noticed are in survivors.toml. Writes docs/explanation/mutants.md; exits with 1 if a
survivor has no reason, or a reason no survivor.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import shutil
import sqlite3
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import change_cwd, walk_mutatable_files
from mutmut.utils.format_utils import orig_function_and_class_names_from_key

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUNS = ROOT / "build" / "mutants"
PAGE = ROOT / "docs" / "explanation" / "mutants.md"
SESSION = "session.sqlite"
CONFIG = "tests/mutants/cosmic_ray.toml"
CODE = ["triton_lstm", "kernels", "pyproject.toml", CONFIG]
TESTS = ["tests", ":!tests/mutants"]
OF_MUTMUT = dict.fromkeys(("survived", "no tests"), "survived") | dict.fromkeys(
    ("killed", "timeout", "segfault", "check was interrupted by user"),
    "noticed",  # the last: no test could be imported
)
OF_COSMIC_RAY = {TestOutcome.SURVIVED: "survived", TestOutcome.KILLED: "noticed"}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}

INTRODUCTION = """\
# Mutants of the Python code

A mutant is the code with one change: another constant, operator or argument. A test should notice it. One that no test
notices, a survivor, shows a missing test or superfluous code, or has a reason: `tests/mutants/survivors.toml` has them.
`make mutants` makes and runs mutants and writes this page: mutmut's of functions without decorators, and cosmic-ray's
of the kernels with which programs wait for each other, in Triton's interpreter. `pyproject.toml` and
`tests/mutants/cosmic_ray.toml` name the tests that are run, which are those of seconds. Messages are not changed.
[Mutants of the compiled kernels](ptx_mutants.md) are on another page.
"""


class Mutant(NamedTuple):
    """change: the lines before and after, None where nothing needs them."""

    tool: str
    file: str
    function: str
    outcome: str
    change: tuple[str, str]

    @property
    def key(self) -> str:
        """Without a number that another mutant could have tomorrow."""
        return f"{self.function}: {self.change[0]} -> {self.change[1]}"


def git(*command: str, folder: Path = ROOT) -> str:
    return subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def clone(tool: str) -> Path:
    """A clone of the last commit, with the outcomes of the last run if the code is the same.

    If only tests have changed, to notice more, the survivors run again.
    """
    folder, head = RUNS / tool, git("rev-parse", "HEAD")
    if git("status", "--porcelain", "--", *CODE, *TESTS):
        sys.exit("there are changes that are not committed, which no clone would have: commit or stash them")
    if folder.exists() and git("diff", "--name-only", git("rev-parse", "HEAD", folder=folder), head, "--", *CODE):
        shutil.rmtree(folder)
    if not folder.exists():
        git("clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder))
    if git("diff", "--name-only", git("rev-parse", "HEAD", folder=folder), head, "--", *TESTS):
        git("fetch", "--quiet", str(ROOT), head, folder=folder)
        git("checkout", "--quiet", "--force", head, folder=folder)
        forget_survivors(folder)
    return folder


def forget_survivors(folder: Path) -> None:
    if (folder / SESSION).exists():
        with contextlib.closing(sqlite3.connect(folder / SESSION)) as database, database:
            database.execute("DELETE FROM work_results WHERE test_outcome = 'SURVIVED'")
    for data in results_of_mutmut(folder):
        for name, code in data.exit_code_by_key.items():
            if OF_MUTMUT.get(status_by_exit_code[code]) == "survived":
                data.exit_code_by_key[name] = None
        data.save()


def results_of_mutmut(folder: Path) -> Iterator[SourceFileMutationData]:
    """Of each file with mutants; the current folder is the clone meanwhile."""
    if not (folder / "mutants").exists():
        return
    with change_cwd(folder):
        for path in walk_mutatable_files():
            data = SourceFileMutationData(path=path)
            data.load()
            yield data


def start(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    """A command of this environment in a clone, whose modules come before those of an editable installation."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT | {"PATH": path})


def changed_lines(diff: str) -> tuple[str, str]:
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    before, after = (" ".join(" ".join(line[1:].split()) for line in lines if line[:1] == sign) for sign in ("-", "+"))
    return before, after


def of_mutmut(folder: Path) -> list[Mutant]:
    found: list[Mutant] = []
    for data in results_of_mutmut(folder):
        for name, code in data.exit_code_by_key.items():
            outcome = OF_MUTMUT.get(status_by_exit_code[code], "")
            function, owner = orig_function_and_class_names_from_key(name)
            change = changed_lines(get_diff_for_mutant(name, path=data.path)) if outcome == "survived" else ("", "")
            where = f"{owner}.{function}" if owner else function
            found.append(Mutant("mutmut", str(data.path), where, outcome, change))
    return found


def of_cosmic_ray(folder: Path) -> list[Mutant]:
    found: list[Mutant] = []
    if not (folder / SESSION).exists():
        return found
    with use_db(str(folder / SESSION), WorkDB.Mode.open) as database:
        results = dict(database.results)
        for item in database.work_items:
            (mutation,), result = item.mutations, results.get(item.job_id)
            if result is not None and result.worker_outcome == WorkerOutcome.SKIPPED:
                continue
            outcome = OF_COSMIC_RAY.get(result.test_outcome, "") if result else ""
            change = changed_lines(result.diff or "") if result else ("", "")
            name = mutation.definition_name or "module"
            found.append(Mutant("cosmic-ray", str(mutation.module_path), name, outcome, change))
    return found


def prepare_cosmic_ray(folder: Path) -> None:
    git("checkout", "--quiet", ".", folder=folder)  # a run that was killed left a mutant behind
    if (folder / SESSION).exists():
        return
    for command in (
        ["cosmic-ray", "baseline", CONFIG],
        ["cosmic-ray", "init", CONFIG, f"{SESSION}.new"],
        ["cr-filter-operators", f"{SESSION}.new", CONFIG],
    ):
        if start(folder, *command).wait():
            sys.exit(f"{' '.join(command)} failed")
    (folder / f"{SESSION}.new").rename(folder / SESSION)


def when(tool: str) -> str:
    """What the stored results of a tool are of."""
    folder = RUNS / tool
    results = [*folder.glob(SESSION), *folder.glob("mutants/**/*.meta")]
    if not results:
        return f"{tool}: not run"
    last = datetime.date.fromtimestamp(max(path.stat().st_mtime for path in results))
    commit = git("rev-parse", "--short=12", "HEAD", folder=folder)
    return f"{tool} {importlib.metadata.version(tool)}: {last}, commit {commit}"


def reasons() -> dict[tuple[str, str], str]:
    with open(HERE / "survivors.toml", "rb") as file:
        groups = tomllib.load(file)["survivors"]
    return {(group["file"], key): group["reason"] for group in groups for key in group["changes"]}


def page(mutants: list[Mutant], known: dict[tuple[str, str], str]) -> str:
    by_file, by_reason = defaultdict(list), defaultdict(list)
    for mutant in mutants:
        by_file[mutant.file, mutant.tool].append(mutant.outcome)
        if mutant.outcome == "survived":
            by_reason[mutant.file, known.get((mutant.file, mutant.key), "**Not explained**")].append(mutant)
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton"))
    waiting = sum(not mutant.outcome for mutant in mutants)
    unfinished = f" Not complete: {waiting} of {len(mutants)} mutants have not run." if waiting else ""
    lines = [
        INTRODUCTION,
        f"{when('mutmut')}; {when('cosmic-ray')}; Python {sys.version.split()[0]}, {', '.join(versions)}." + unfinished,
        "",
        "| File | by | mutants | noticed | survivors | not run |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for (file, tool), outcomes in sorted(by_file.items()):
        numbers = " | ".join(str(outcomes.count(outcome)) for outcome in ("noticed", "survived", ""))
        lines.append(f"| `{file}` | {tool} | {len(outcomes)} | {numbers} |")
    lines += ["", "## What nothing notices, and why"]
    for file in sorted({file for file, _ in by_reason}):
        lines += ["", f"### {file}", ""]
        for (of, reason), found in by_reason.items():
            if of != file:
                continue
            lines.append(f"- {reason}")
            for mutant in found:
                before, after = (f"`{text}`" if text else "nothing" for text in mutant.change)
                lines += [f"  - {mutant.function}: {before}", f"    becomes {after}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--children", type=int, default=os.cpu_count() or 2, help="processes at a time, at least 2")
    parser.add_argument("--only", choices=["mutmut", "cosmic-ray", "nothing"], help="run this and report what there is")
    options = parser.parse_args()
    commands = {
        "cosmic-ray": ["cosmic-ray", "exec", CONFIG, SESSION],
        "mutmut": ["mutmut", "run", "--max-children", str(max(1, options.children - 1))],
    }
    chosen = {tool: clone(tool) for tool in commands if options.only in (None, tool)}
    if "cosmic-ray" in chosen:
        prepare_cosmic_ray(chosen["cosmic-ray"])
    running = [start(folder, *commands[tool]) for tool, folder in chosen.items()]
    if any([process.wait() for process in running]):
        sys.exit("a run failed: see above; the next one goes on from there")
    mutants = of_mutmut(RUNS / "mutmut") + of_cosmic_ray(RUNS / "cosmic-ray")
    known = reasons()
    PAGE.write_text(page(mutants, known))
    survivors = {(mutant.file, mutant.key) for mutant in mutants if mutant.outcome == "survived"}
    for title, wrong in (("No reason", survivors - known.keys()), ("No survivor", known.keys() - survivors)):
        for file, key in sorted(wrong):
            print(f"{title}: {file} {key}")
    if survivors ^ known.keys() or any(not mutant.outcome for mutant in mutants):
        sys.exit(1)


if __name__ == "__main__":
    main()
