"""The version where the package is not installed, and what else depends on whether a build has written it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import triton_lstm
from triton_lstm.system import machine
from triton_lstm.system.version import __version__

PACKAGE = Path(triton_lstm.__file__).parent


@pytest.mark.parametrize("built", [False, True])
def test_of_a_copy(built, tmp_path):
    """Without git. With or without a version, it has the same sources."""
    ignore = shutil.ignore_patterns("__pycache__", "results", machine.GENERATED)
    copy = Path(shutil.copytree(PACKAGE, tmp_path / "triton_lstm", ignore=ignore))
    if built:
        (copy / machine.GENERATED).write_text('__version__ = "1.2.3"\n')
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from triton_lstm.cli.main import main; from triton_lstm.system import machine\n"
        "print(machine.commit(), machine.hash_of(machine.PACKAGE), flush=True); main(['--version'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    version = "1.2.3" if built else "0+unknown"
    assert done.stdout == f"{version} {machine.hash_of(PACKAGE)}\ntriton-lstm {version}\n", done.stderr


def test_results_of_a_checkout_name_the_commit(monkeypatch):
    monkeypatch.setattr(machine, "PACKAGE", PACKAGE / "nowhere" / "triton_lstm")
    assert machine.commit() == __version__
    monkeypatch.undo()
    if (PACKAGE.resolve().parent / ".git").exists():
        command = ["git", "describe", "--tags", "--always", "--dirty"]
        done = subprocess.run(command, cwd=PACKAGE.resolve(), check=True, capture_output=True, text=True)
        assert done.stdout.strip() == machine.commit()
