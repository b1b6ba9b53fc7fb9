"""The rooms of the package: what a hash of the sources sees, old names, and where things that no import names are."""

import subprocess
import sys
from pathlib import Path

import pytest

import triton_lstm
from triton_lstm.planning.devices import file_name
from triton_lstm.system import machine
from triton_lstm.tuning import tables

PACKAGE = Path(triton_lstm.__file__).parent
ROOMS = sorted(
    {path.parent for folder in (PACKAGE, PACKAGE / "kernels", PACKAGE / "perf") for path in folder.rglob("*.py")}
)


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(PACKAGE)))
def test_the_hash_of_the_sources_sees_every_room(room, tmp_path):
    """Of a made-up package with the same files, one of which changes."""
    for path in machine.sources(PACKAGE).values():
        copy = tmp_path / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    before = machine.hash_of(tmp_path)
    changed = next((tmp_path / room.relative_to(PACKAGE)).glob("*.py"))
    changed.write_text("# changed")
    assert machine.hash_of(tmp_path) != before
    changed.rename(changed.with_name("another_name.py"))
    assert machine.hash_of(tmp_path) != before


def test_files_that_only_show_results_are_not_in_it():
    missing = [name for name in machine.PRESENTATION if not (PACKAGE / name).exists()]
    assert not missing and not machine.PRESENTATION & machine.sources(PACKAGE).keys()


def test_tables_are_shipped():
    assert (tables.SHIPPED / file_name("NVIDIA H200")).is_file()


@pytest.mark.parametrize("old, new", [("ops", "operator.library"), ("devices", "planning.devices")])
def test_old_names_say_where_they_have_moved(old, new, interpreter):
    code = (
        f"import triton_lstm.{old} as old, triton_lstm.{new} as new\n"
        "print(all(getattr(old, name) is getattr(new, name) for name in old.__all__))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
    )
    assert done.stdout == "True\n"
    assert f"triton_lstm.{old} is deprecated: import triton_lstm.{new} instead" in done.stderr
