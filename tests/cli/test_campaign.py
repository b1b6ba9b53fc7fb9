"""`make gpu`, with a stub for Python that prints its arguments: the pieces, and the effect of a failure."""

import csv
import os
import shutil
import signal
import subprocess
import sys

import pytest
from child import TESTS, python_path

ROOT = TESTS.parent
PYTHON = """#!/bin/sh
case "$*" in
    *"{fails}"*) echo "$@" >&2; exit 3;;
    *cli.machine*--table*) echo {table};;
    *cli.machine*) echo "$@" >> {asked}; mkdir -p {out}; echo {out};;
    -c*xdist*) echo "-n 8";;
    -c*) ;;
    *) echo "ran $@";;
esac
"""
TIMEOUT = """#!/bin/sh
shift
echo "stopped after $1 s: $*"
shift
exec "$@"
"""
SANITIZER = """#!/bin/sh
echo "ran $*"
"""
TABLE = "triton_lstm/tuned/some_gpu.json"
BESIDE = ["gpu-warm", "gpu-test", "gpu-memcheck", "gpu-racecheck"]
TIMED = ["gpu-bench-quick", "gpu-stress", "gpu-tune", "gpu-bench"]
PIECES = {
    "gpu-look": ["triton_lstm doctor", "perf.stress --small"],
    "gpu-warm": ["cli.warm --suite quick --suite standard --hidden"],
    "gpu-test": ["-m pytest -n 8 tests/operator/test_layer.py"],
    "gpu-bench-quick": ["bench --suite quick --out"],
    "gpu-stress": ["perf.stress --out"],
    "gpu-tune": [f"--budget 270s --verbose --out {TABLE}"],
    "gpu-bench": ["bench --suite standard --out"],
}


@pytest.fixture
def make(tmp_path):
    if not shutil.which("make"):
        pytest.skip("needs make")

    def call(*arguments, fails="nothing", **variables):
        out, programs = tmp_path / "out", tmp_path / "programs"
        programs.mkdir(exist_ok=True)
        text = PYTHON.format(out=out, asked=tmp_path / "asked", fails=fails, table=TABLE)
        for name, content in (("python", text), ("timeout", TIMEOUT), ("compute-sanitizer", SANITIZER)):
            (programs / name).write_text(content)
            (programs / name).chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        environment |= variables | {"PATH": f"{programs}:{environment['PATH']}"}
        command = ["make", "-C", str(ROOT), *arguments, f"PYTHON={programs / 'python'}"]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return call


def lines_of(done, begin):
    return [line for line in done.stdout.splitlines() if line.startswith(begin)]


def test_every_piece_runs_in_order(make, tmp_path):
    done = make("gpu", f"OUT={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    ran = lines_of(done, "ran ")
    sanitized = [line for line in ran if "--tool" in line]
    wanted = [text for texts in PIECES.values() for text in texts]
    places = [next(k for k, line in enumerate(ran) if text in line) for text in wanted]
    assert len(sanitized) == 2 and len(ran) == len(wanted) + 2
    assert places[:2] == [0, 1] and places[-4:] == list(range(len(ran) - 4, len(ran)))  # warm and test in between
    logs = {path.stem for path in (tmp_path / "out").glob("*.log")}
    assert logs == {*PIECES, *BESIDE} - {"gpu-bench", "gpu-bench-quick"}  # which write their own
    assert all(f"{name}.csv" in done.stdout for name in ("gpu-look", "gpu-test", "gpu-stress"))
    assert (tmp_path / "asked").read_text().splitlines() == [f"-m triton_lstm.cli.machine {tmp_path / 'out'}"] * 2


def test_it_takes_half_an_hour_at_most(make, tmp_path):
    """Each piece is stopped in time; parallel ones count once."""
    seconds = {}
    for piece in ("gpu-look", *BESIDE, *TIMED):
        limits = lines_of(make(piece, f"OUT={tmp_path / 'out'}"), "stopped after ")
        seconds[piece] = sum(int(line.split()[2]) for line in limits)
        assert limits
    assert all(0 < limit < 600 for limit in seconds.values())
    beside = max(seconds.pop(piece) for piece in BESIDE)
    assert beside + sum(seconds.values()) <= 30 * 60 - 30  # which it takes to begin


def test_all_tests_run_except_codegen(make, tmp_path):
    (line,) = lines_of(make("gpu-test", f"OUT={tmp_path / 'out'}"), "ran ")
    named = [word for word in line.split() if word.startswith("tests/")]
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(named) == len(set(named)) and set(named) == there - {"tests/kernels/test_codegen.py"}


def test_without_xdist_the_tests_run_in_one_process(make, tmp_path):
    (line,) = lines_of(make("gpu-test", f"OUT={tmp_path / 'out'}", fails="import os, xdist"), "ran ")
    assert "-m pytest tests/operator/test_layer.py" in line


def test_out_in_the_environment_is_ignored(make, tmp_path):
    assert make("gpu-stress", OUT="/nowhere").returncode == 0
    assert {line.split(maxsplit=1)[1] for line in (tmp_path / "asked").read_text().splitlines()} == {
        "triton_lstm.cli.machine"
    }


def test_a_failing_piece_does_not_stop_the_others_but_is_reported(make):
    for fails in ("perf.stress --out", "-m pytest", "cli.warm"):
        done = make("gpu", fails=fails)
        assert done.returncode != 0 and "ran -m triton_lstm bench --suite standard" in done.stdout


def test_everything_stops_if_something_is_bad(make):
    done = make("gpu", fails="triton_lstm doctor")
    assert done.returncode != 0 and "ran " not in done.stdout


@pytest.mark.parametrize("piece", ["gpu", "gpu-bench", "gpu-stress"])
@pytest.mark.parametrize("fails, told", [("cli.machine", ""), ("import torch", "lacks a package")])
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
    assert False, "for a reason\\n" * 100

def test_skipped():
    pytest.skip("why not")

def test_stops_all():
    os.kill({process}, signal.SIGTERM)
    signal.pause()
"""


@pytest.mark.parametrize("process, workers", [("os.getpid()", []), ("os.getppid()", ["-n", "1"])], ids=["one", "xdist"])
def test_a_stopped_test_run_keeps_the_outcomes_so_far(process, workers, tmp_path):
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_stopped.py").write_text(STOPPED.format(process=process))
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name")
    path = tmp_path / "tests.csv"
    command = [sys.executable, "-m", "pytest", *workers, "-p", "conftest", "--csv", str(path)]
    command += ["--continue-on-collection-errors", "--rootdir", str(tmp_path), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": python_path(TESTS, TESTS / "helpers")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM, done.stdout + done.stderr
    header, *rows = csv.reader(path.read_text().splitlines())
    assert header == ["test", "outcome", "seconds", "reason", "commit"]
    outcomes = {row[0].rpartition("::")[2]: row[1] for row in rows}
    expected = {"test_passes": "passed", "test_fails": "failed", "test_skipped": "skipped"}
    assert outcomes == expected | {"test_broken.py": "not collected"}, rows
    reasons = {row[0].rpartition("::")[2]: row[3] for row in rows}
    assert reasons.pop("test_broken.py").endswith("ModuleNotFoundError: No module named 'nothing_of_this_name'")
    failure = ("AssertionError: " + "for a reason " * 100)[:200]
    assert reasons == {"test_passes": "", "test_fails": failure, "test_skipped": "Skipped: why not"}
    assert "test_stopped.py::test_fails" in done.stdout and 'assert False, "for a reason' in done.stdout
