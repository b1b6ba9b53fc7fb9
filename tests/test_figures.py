"""The pictures of the documentation: `make figures` writes those that pages show, and no others are there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("anybadge", reason="it draws the badges")

ROOT = Path(__file__).parents[1]
BY_TRAINING = {"real_text.png"}  # by other commands of `make figures`
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def write_to(folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "docs/figures", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shown() -> set[Path]:
    """Images of docs/images in pages."""
    found = set()
    for page in PAGES:
        for link in re.findall(r"\]\(([^)]*\bimages/[^)]+)\)", page.read_text()):
            found.add((page.parent / link).resolve())
    return found


def test_two_runs_write_the_same_bytes(tmp_path):
    first, second = write_to(tmp_path / "first"), write_to(tmp_path / "second")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert not [name for name, svg in first.items() if b"<dc:date>" in svg]
    badges = {name: (ROOT / "docs/images" / name).read_bytes() for name in first if name.startswith("badge_")}
    assert badges and badges == {name: first[name] for name in badges}, "run: make figures"
    assert first.keys() | BY_TRAINING == {path.name for path in (ROOT / "docs/images").iterdir()}


def test_every_image_is_shown_and_says_what_it_shows():
    assert {path.name for path in shown()} == {path.name for path in (ROOT / "docs/images").iterdir()}
    for page in PAGES:
        assert "![](" not in page.read_text(), f"{page}: a picture without a description"
