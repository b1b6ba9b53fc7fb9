"""docs/versions.csv: nothing that was tested failed, and pyproject.toml allows nothing older than what was tested."""

import sys

import pytest

pytest.importorskip("pandas")
pytest.importorskip("tabulate")
if sys.version_info < (3, 11):
    pytest.importorskip("tomli")
import matrix
from packaging.specifiers import Specifier
from packaging.version import Version


def test_no_environment_failed():
    frame = matrix.results()
    results, passed = frame["result"], frame[frame["result"] == "passed"]
    assert results.map(lambda result: result in ("", "passed") or result.startswith("not run: ")).all(), results
    assert "oldest" in passed.index and (passed["failed"] == "0").all() and (passed["passed"].astype(int) > 100).all()


def test_the_oldest_versions_that_are_allowed_were_tested():
    oldest, floors = matrix.results().loc["oldest"], matrix.floors(matrix.requirements(*matrix.EXTRAS))
    assert floors.keys() == set(matrix.dependencies())
    untested = {name: floor for name, floor in floors.items() if Version(oldest[name]) not in Specifier(f"=={floor}")}
    assert not untested


def test_what_was_never_tested_reads_not_run(monkeypatch):
    monkeypatch.setattr(matrix, "ENVIRONMENTS", {"of tomorrow": matrix.Environment("3.99")})
    rows = matrix.table(matrix.results()).splitlines()[2:]
    assert len(rows) > 20 and all(row.split("|")[2].strip() == "not run" for row in rows)


def test_a_python_that_is_missing_is_a_reason(tmp_path):
    assert matrix.install(matrix.Environment("3.99"), tmp_path) == "there is no python3.99"
