"""What a release says about itself: metadata, changelog, citation, and the versions that development is pinned to."""

import datetime
import re
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
GROUPS = {"added", "changed", "deprecated", "removed", "fixed", "security"}


def test_classifiers_and_keywords():
    known = pytest.importorskip("trove_classifiers").classifiers
    assert set(PROJECT["classifiers"]) <= known and sorted(PROJECT["keywords"]) == PROJECT["keywords"]
    pythons = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)]
    assert PROJECT["requires-python"] == f">={pythons[0]}" and "3.13" in pythons


def problems(changelog: Path, citation: dict, tag: str | None) -> list[str]:
    """What changelog, citation and the tag of the commit, if it has one, disagree about."""
    sections = pytest.importorskip("keepachangelog").to_dict(str(changelog), show_unreleased=True)
    found = [f"group {group}" for section in sections.values() for group in section.keys() - {*GROUPS, "metadata"}]
    dates = {name: section["metadata"]["release_date"] for name, section in sections.items()}
    released = [(name, date) for name, date in dates.items() if name != "unreleased"]
    for name, date in released:
        try:
            datetime.date.fromisoformat(date)
        except (TypeError, ValueError):
            found.append(f"date of {name}")
    if "unreleased" in list(sections)[1:]:
        found.append("order")
    if tag and f"v{next(iter(sections), None)}" != tag:
        found.append("tag")
    if (citation.get("version"), str(citation.get("date-released"))) != (released or [(None, "None")])[0]:
        found.append("citation")
    return found


def test_changelog_and_citation_agree_with_the_tag():
    yaml = pytest.importorskip("yaml")
    command = ["git", "-C", ROOT, "describe", "--tags", "--exact-match", "--match", "v*"]
    tag = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert problems(ROOT / "CHANGELOG.md", citation, tag or None) == []
    assert citation["title"] == "triton_lstm" and citation["authors"] and citation["license"] == PROJECT["license"]


OLD = "## [0.1.0] - 2026-11-27\n\n### Added\n\n- a\n"
CITED = {"version": "0.1.0", "date-released": datetime.date(2026, 11, 27)}


@pytest.mark.parametrize(
    "text, citation, tag, expected",
    [
        ("## [Unreleased]\n\n### Added\n\n- a\n", {}, None, []),
        ("## [Unreleased]\n\n### Fixed\n\n- a\n\n" + OLD, CITED, None, []),
        (OLD, CITED, "v0.1.0", []),
        (OLD, CITED, "v0.2.0", ["tag"]),
        ("## [Unreleased]\n\n### Fixed\n\n- a\n\n" + OLD, CITED, "v0.1.0", ["tag"]),
        (OLD, {}, None, ["citation"]),
        (OLD, CITED | {"version": "0.2.0"}, None, ["citation"]),
        (OLD.replace("2026-11-27", "soon"), CITED, None, ["date of 0.1.0", "citation"]),
        ("## [Unreleased]\n\n- a\n", {}, None, ["group uncategorized"]),
        (OLD + "\n## [Unreleased]\n\n### Fixed\n\n- a\n", CITED, None, ["order"]),
    ],
)
def test_disagreements_are_found(text, citation, tag, expected, tmp_path):
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{text}")
    assert problems(tmp_path / "CHANGELOG.md", citation, tag) == expected


@pytest.mark.parametrize("form", sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")), ids=lambda path: path.stem)
def test_issue_forms_ask_for_what_doctor_says(form):
    fields = pytest.importorskip("yaml").safe_load(form.read_text())["body"]
    assert any("`triton-lstm doctor`" in field["attributes"]["label"] for field in fields)


def pinned(name: str) -> list[str]:
    """The pins in a file, without hashes; each of them in pins.txt has some."""
    pins = (ROOT / name).read_text().replace("\\\n", "").splitlines()
    pins = [line for line in pins if not line.startswith("#")]
    assert name != "pins.txt" or all("--hash=sha256:" in line for line in pins)
    return [line.partition("--hash")[0].strip() for line in pins]


def test_one_set_of_versions():
    """constraints.txt and pins.txt have the same ones, for everything that pyproject.toml asks for: `make pins`."""
    requirements = pytest.importorskip("packaging.requirements")
    constraints, pins = pinned("constraints.txt"), pinned("pins.txt")
    (torch,) = (line for line in constraints if line.startswith("torch=="))
    assert set(constraints) - set(pins) == {torch} and set(pins) <= set(constraints)
    versions: dict[str, list[str]] = {}
    for line in constraints:
        name, version = line.partition(";")[0].strip().split("==")
        versions.setdefault(name, []).append(version)
    asked = [*PROJECT["dependencies"], *PYPROJECT["build-system"]["requires"]]
    for text in sum(PROJECT["optional-dependencies"].values(), asked):
        wanted = requirements.Requirement(text)
        if wanted.name != PROJECT["name"]:
            found = versions.get(re.sub(r"[-_.]+", "-", wanted.name).lower(), [])
            assert found and all(wanted.specifier.contains(version) for version in found), text
