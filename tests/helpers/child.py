"""What a test's child process imports."""

import os
from pathlib import Path

TESTS = Path(__file__).parents[1]


def python_path(*before: Path) -> str:
    """A PYTHONPATH: those folders, the checkout, and what this process was given."""
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join(map(str, (*before, TESTS.parent, *given)))
