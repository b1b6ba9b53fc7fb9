"""Badges of README.md: what pyproject.toml and stored results say, in the form that readers of such pages know."""

import re
from pathlib import Path

import anybadge
import pandas as pd
import style

ROOT = Path(__file__).parents[2]


def badges() -> dict[str, anybadge.Badge]:
    """By file name: the licence, and the versions of Python and torch with which tests passed."""
    project = (ROOT / "pyproject.toml").read_text()
    tried = pd.read_csv(ROOT / "docs/versions.csv", dtype=str)
    passed = tried[tried.result == "passed"]
    texts = {
        "licence": re.findall(r'^license = "(.*)"', project, re.MULTILINE)[0],
        "python": _range(passed.Python),
        "torch": _range(passed.torch),
    }
    return {f"badge_{name}": anybadge.Badge(name, text, default_color=style.BLUE) for name, text in texts.items()}


def _range(versions: pd.Series) -> str:
    """The oldest and the newest one, by their first two numbers."""
    releases = sorted({tuple(map(int, version.split(".")[:2])) for version in versions})
    first, last = (".".join(map(str, release)) for release in (releases[0], releases[-1]))
    return first if first == last else f"{first} to {last}"
