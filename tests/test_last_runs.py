"""What `--record` writes, and that a run with --cov fails where too few branches were taken."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_cov")
pytest.importorskip("xdist")
HELPERS = Path(__file__).parent / "helpers"
CONFTEST = """
import functools, pathlib
import last_runs
pytest_plugins = ["last_runs"]
last_runs.record = functools.partial(last_runs.record, path=pathlib.Path("runs.csv"))
"""
MODULE = """
def sign(x):
    if x > 0:
        return 1
    return -1
"""
TESTS = """
import measured, pytest

@pytest.mark.parametrize("x", {values})
def test_sign(x, record_property):
    assert measured.sign(x) in (1, -1)
    record_property("calls", 1)
    record_property("calls", 2)
"""


@pytest.mark.parametrize("values, processes, status, share", [([1, -1], 2, 0, "100.0"), ([1, 2], 0, 1, "50.0")])
def test_branches_are_counted_and_judged(values, processes, status, share, tmp_path):
    for name, text in (("conftest.py", CONFTEST), ("measured.py", MODULE), ("test_it.py", TESTS.format(values=values))):
        (tmp_path / name).write_text(text)
    (tmp_path / ".coveragerc").write_text("[run]\nbranch = true\nsource = measured\n[report]\nfail_under = 1\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTEST"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(HELPERS), str(HELPERS.parents[1])])
    command = [sys.executable, "-m", "pytest", "-q", "--record", "mine", "-n", str(processes), "--cov"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    assert f"{share}% of the branches were taken; 95.0% are required" in done.stdout
    with open(tmp_path / "runs.csv", newline="") as file:
        rows = {row["figure"]: row["value"] for row in csv.DictReader(file)}
    assert (rows["passed"], rows["failed"], rows["random calls"], rows["% of branches"]) == ("2", "0", "6", share)
    if status:  # unless it is not to be judged
        command.append("--cov-fail-under=0")
        assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=300).returncode == 0
