"""`make gpu`, with a stand-in for Python that says what it was asked to run: its pieces, and what a failure does."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = """#!/bin/sh
case "$*" in
    *"{fails}"*) echo "$@"; exit 3;;
    *perf.machine*--table*) echo {table};;
    *perf.machine*) mkdir -p {out}; echo {out};;
    -c*) ;;
    *) echo "ran $@";;
esac
"""
TABLE = "triton_lstm/tuned/some_gpu.json"
PIECES = [
    "gpu-test-layer",
    "gpu-test-plans",
    "gpu-test-packed",
    "gpu-test-dropin",
    "gpu-test-perf",
    "gpu-test-rest",
    "gpu-stress",
    "gpu-tune",
    "gpu-bench",
]


@pytest.fixture
def make(tmp_path):
    if not shutil.which("make"):
        pytest.skip("needs make")

    def call(*arguments, fails="nothing"):
        python = tmp_path / "python"
        python.write_text(PYTHON.format(out=tmp_path / "out", fails=fails, table=TABLE))
        python.chmod(0o755)
        command = ["make", "-C", str(ROOT), *arguments, f"PYTHON={python}", f"OUT={tmp_path / 'out'}"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return call


def test_every_piece_runs(make, tmp_path):
    done = make("gpu")
    assert done.returncode == 0, done.stderr
    ran = [line for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert len(ran) == len(PIECES) + 2 * bool(shutil.which("compute-sanitizer"))
    assert "bench --suite standard" in ran[-1] and sum("-m pytest" in line for line in ran) == 6
    logs = {path.stem for path in (tmp_path / "out").glob("*.log")}
    assert logs == {*PIECES, "gpu-memcheck", "gpu-racecheck"} - {"gpu-bench"}  # which writes its own
    assert all(f"{name}.csv" in done.stdout for name in PIECES[:-2])
    assert f"--out {TABLE}" in ran[-2]


def test_a_failing_piece_does_not_stop_the_others_and_is_not_forgotten(make):
    done = make("gpu", fails="perf.stress --out")
    assert done.returncode != 0 and "ran -m triton_lstm bench --suite standard" in done.stdout


@pytest.mark.parametrize("piece", ["gpu", "gpu-bench", "gpu-stress"])
@pytest.mark.parametrize("fails, told", [("perf.machine", ""), ("import torch", "lacks a package")])
def test_nothing_runs_without_a_gpu_or_its_packages(make, piece, fails, told):
    done = make(piece, fails=fails)
    assert done.returncode != 0 and "ran " not in done.stdout and told in done.stderr


def test_suites_by_name(make):
    for suite in ("quick", "full"):
        assert f"bench --suite {suite} " in make(f"gpu-bench-{suite}").stdout


STOPPED = """
import os, signal
import pytest

def test_passes():
    pass

def test_fails():
    assert False

def test_skipped():
    pytest.skip("why")

def test_stops_all():
    os.kill({process}, signal.SIGTERM)
    signal.pause()
"""


@pytest.mark.parametrize("process, workers", [("os.getpid()", []), ("os.getppid()", ["-n", "1"])], ids=["one", "xdist"])
def test_a_run_of_tests_that_is_stopped_leaves_the_outcomes_so_far(process, workers, tmp_path):
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_stopped.py").write_text(STOPPED.format(process=process))
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name")
    path = tmp_path / "tests.csv"
    command = [sys.executable, "-m", "pytest", *workers, "-p", "conftest", "--csv", str(path)]
    command += ["--continue-on-collection-errors", "--rootdir", str(tmp_path), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM, done.stdout + done.stderr
    header, *rows = csv.reader(path.read_text().splitlines())
    assert header == ["test", "outcome", "seconds"]
    outcomes = {row[0].rpartition("::")[2]: row[1] for row in rows}
    expected = {"test_passes": "passed", "test_fails": "failed", "test_skipped": "skipped"}
    assert outcomes == expected | {"test_broken.py": "not collected"}, rows
