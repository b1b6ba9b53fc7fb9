"""Runs tests with other versions of Python and of the packages; what came of it is in docs/versions.csv.

`python tests/helpers/matrix.py TESTS...` (make test-matrix) makes one environment after the other: gigabytes, deleted
after. The row of each goes to docs/versions.csv at once: a run that is stopped keeps what it had.
"""

import argparse
import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import last_runs
import pandas as pd
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from triton_lstm.system.machine import now

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "pyproject.toml"
FOLDERS = ROOT / ".matrix"
RESULTS = ROOT / "docs" / "versions.csv"
EXTRAS = ("perf", "train", "wandb", "onnx")  # what users install; the others are for development
OUTCOMES = ("result", "passed", "skipped", "failed", "date")


class Environment(NamedTuple):
    """What is installed beside the project and its extra `test`: pip takes the newest of all that is not named here.

    floors: every dependency in the oldest version that pyproject.toml allows. pinned: as in constraints.txt.
    """

    python: str
    constraints: tuple[str, ...] = ()
    floors: bool = False
    pinned: bool = False


ENVIRONMENTS = {
    "oldest": Environment("3.10", ("pyparsing<3.3",), floors=True),  # of newer ones, that matplotlib makes warnings
    "torch-2.11": Environment("3.12", ("torch==2.11.*", "numpy<2.4")),  # of newer ones, Triton 3.6 makes errors
    "pinned": Environment("3.11", pinned=True),
    "torch-2.14": Environment("3.12", ("torch==2.14.*", "pandas<3")),
    "python-3.10": Environment("3.10"),
    "newest": Environment("3.13"),
    "python-3.14": Environment("3.14"),
}


def requirements(*extras: str) -> list[Requirement]:
    """What the project and these extras depend on, but for other extras of the project."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    found = [Requirement(text) for group in groups for text in group]
    return [requirement for requirement in found if requirement.name != project["name"]]


def dependencies() -> list[str]:
    """What the project and the extras that users install depend on."""
    return sorted({canonicalize_name(requirement.name) for requirement in requirements(*EXTRAS)})


def floors(of: Iterable[Requirement]) -> dict[str, str]:
    """The oldest version that is allowed of each dependency that has one."""
    bounds = [(r.name, bound) for r in of for bound in r.specifier if bound.operator == ">="]
    return {canonicalize_name(name): bound.version for name, bound in bounds}


def exactly(versions: Mapping[str, str]) -> list[str]:
    return [f"{package}=={version}" for package, version in versions.items()]


def install(environment: Environment, folder: Path) -> str:
    """Makes the environment in an empty folder; the reason if that is not possible."""
    name = f"python{environment.python}"
    if not shutil.which(name) or subprocess.run([name, "--version"]).returncode:
        return f"there is no {name}"
    constraints = list(environment.constraints)
    if environment.floors:
        constraints += exactly(floors(requirements(*EXTRAS, "test")))
    if environment.pinned:
        constraints += (ROOT / "constraints.txt").read_text().splitlines()
    subprocess.run([name, "-m", "venv", "--upgrade-deps", folder], check=True)
    (folder / "constraints.txt").write_text("\n".join(constraints))
    build = tomllib.loads(PROJECT.read_text())["build-system"]["requires"]
    oldest = exactly(floors(map(Requirement, build))) if environment.floors else []
    (folder / "build.txt").write_text("\n".join(oldest))
    command = [folder / "bin/python", "-m", "pip", "install", *shlex.split(os.environ.get("PIP_OPTIONS", ""))]
    command += ["--no-cache-dir", "--quiet", "--build-constraint", folder / "build.txt", "-e", f"{ROOT}[test]"]
    done = subprocess.run([*command, "-c", folder / "constraints.txt"], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or ["pip failed"]
        return reasons[0].removeprefix("ERROR: ")
    return ""


def installed(folder: Path) -> dict[str, str]:
    """The versions that the environment itself reports, of Python and of all dependencies: "-" if not needed there."""
    code = """if True:
        import importlib.metadata, json, platform
        found = {package.name: package.version for package in importlib.metadata.distributions()}
        print(json.dumps(found | {"Python": platform.python_version()}))"""
    done = subprocess.run([folder / "bin/python", "-c", code], stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(done.stdout)
    versions = {canonicalize_name(name): version for name, version in found.items()}
    return {"Python": found["Python"]} | {name: versions.get(name, "-") for name in dependencies()}


def run(tests: list[str], folder: Path) -> dict[str, str]:
    """How many of the tests passed, were skipped and failed."""
    outcomes = folder / "outcomes.csv"
    command = [folder / "bin/python", "-m", "pytest", "-q", "-n", "auto", "--dist", "loadfile", "--csv", outcomes]
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    status = subprocess.run([*command, *tests], cwd=ROOT, env=environment).returncode
    if status not in (0, 1):
        return {"result": f"pytest ended with {status}"}
    with open(outcomes, newline="") as file:
        counts = last_runs.count_outcomes(pd.DataFrame(csv.DictReader(file)))
    return {"result": "failed" if status else "passed"} | {name: str(count) for name, count in counts.items()}


def try_out(name: str, tests: list[str], keep: bool) -> dict[str, str]:
    """What comes of an environment, which is deleted after unless it is to be kept."""
    folder = FOLDERS / name
    ready = folder / "ready"
    try:
        if not (keep and ready.exists()):
            shutil.rmtree(folder, ignore_errors=True)
            if reason := install(ENVIRONMENTS[name], folder):
                return {"result": f"not run: {reason}"}
            ready.touch()
        versions = installed(folder)
        print(name, versions, flush=True)
        return versions | run(tests, folder)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def results(path: Path = RESULTS) -> pd.DataFrame:
    """What is known of each environment, in their order: empty of one that was never tried."""
    known = pd.read_csv(path, dtype=str, index_col="environment") if path.exists() else pd.DataFrame()
    return known.reindex(index=list(ENVIRONMENTS), columns=["Python", *dependencies(), *OUTCOMES]).fillna("")


def table(frame: pd.DataFrame) -> str:
    return frame.replace("", "not run").T.to_markdown(disable_numparse=True) + "\n"


def add(name: str, row: dict[str, str]) -> None:
    """Adds the row of an environment, or replaces it."""
    frame = results()
    frame.loc[name] = pd.Series(row).reindex(frame.columns).fillna("")
    frame.to_csv(RESULTS, index_label="environment", lineterminator="\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="What is not listed here goes to pytest: files, -k, ...")
    parser.add_argument("--environment", action="append", choices=ENVIRONMENTS, help="may be repeated; default: all")
    parser.add_argument("--keep", action="store_true", help="leave it in .matrix, and take one that was left there")
    arguments, tests = parser.parse_known_args()
    passed = []
    for name in arguments.environment or ENVIRONMENTS:
        row = try_out(name, tests, arguments.keep) | {"date": now()[:10]}
        print(name, row, flush=True)
        add(name, row)
        passed.append(row["result"] == "passed")
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
