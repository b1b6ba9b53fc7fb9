"""Every code block of the documentation runs, each page from top to bottom, or says why not."""

import re
import subprocess
import sys
import unittest
from pathlib import Path

import pytest
import torch

pytest.importorskip("sybil", reason="the blocks of pages are found by sybil")
pytest.importorskip("pandas")
pytest.importorskip("pydantic")
import blocks
import texts

from triton_lstm.cli.main import _parser
from triton_lstm.perf import floor

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "RELIABILITY.md", "perf/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMES = {page: str(page.relative_to(ROOT)) for page in PAGES}
SPHINX = {"{toctree}", "{eval-rst}"}
NOT_CODE = {"text"}


@pytest.fixture
def printed(capsys):
    """What was printed since the last call."""

    def read() -> str:
        out, err = capsys.readouterr()
        return out + err

    return read


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_blocks_of(page, request, printed, own_text_cache, tmp_path, monkeypatch):
    """In the interpreter, and on a GPU those of pages that need one."""
    needs_gpu = "skip: next if(not torch.cuda.is_available()" in page.read_text()
    request.getfixturevalue("device" if needs_gpu else "interpreter")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(floor, "floor_names", lambda device: ["copy", "matmul-fp32"])
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("the quick brown fox jumps over the lazy dog. " * 40)
    texts.write(Path("books"), [b"jackdaws love my big sphinx of quartz. " * 40] * 2)
    texts.save_tokenizer(Path("tokenizer.json"))
    torch.manual_seed(0)
    for example in blocks.document_of(page, printed):
        try:
            example.evaluate()
        except unittest.SkipTest as reason:
            print(f"{NAMES[page]}, line {example.line}: not run, {reason}")
        except Exception as error:
            raise AssertionError(f"{NAMES[page]}, line {example.line}") from error


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_every_block_has_a_language_that_is_checked(page):
    assert blocks.languages_in(page) <= {"python", "console", "yaml"} | NOT_CODE | SPHINX


def test_everything_that_is_made_can_be_made():
    pages = {*PAGES, *ROOT.glob("*.md"), *(ROOT / "perf").glob("*.md")}
    named = {name for page in pages for name in re.findall(r"`make ([a-z][\w-]*)", page.read_text())}
    assert len(named) > 20 and named <= blocks.make_targets()


def test_all_commands_are_shown():
    shown = {
        line.split()[3]
        for page in PAGES
        for line in page.read_text().splitlines()
        if line.startswith("python -m triton_lstm ")
    }
    assert shown == set(_parser()._subparsers._group_actions[0].choices)


def test_tables_are_what_the_code_and_the_results_say():
    pytest.importorskip("cogapp", reason="the tables in pages are made by cog")
    pages = [page for page in PAGES if "<!-- [[[cog" in page.read_text()]
    assert len(pages) >= 3
    folders = [word for folder in ("docs", "tests/helpers") for word in ("-I", ROOT / folder)]
    command = [sys.executable, "-m", "cogapp", "--check", *folders, *pages]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"run: make tables\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    "block", ["```python\n1 / 0\n```", "```console\npython missing.py\n```",
              "```console\ntorchrun --nproc-per-node 2 missing.py\n```",
              "```console\npython -m triton_lstm trian\n```",
              "```console\npython -m triton_lstm tune --hiden 5  # needs a GPU\n```", "```console\nmake tests\n```",
              "```console\nrm -rf x\n```", "```yaml\nhiden: 3\n```", '```console\npip install ".[pref]"\n```',
              "```console\npython -m triton_lstm.perf.scaling --bandwith 3\n```"],
)  # fmt: skip
def test_what_is_wrong_in_a_block_is_found(block, tmp_path, printed, own_text_cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(block + "\n")
    (example,) = blocks.document_of(page, printed)
    with pytest.raises((AssertionError, ZeroDivisionError)):
        example.evaluate()


def test_a_block_with_a_reason_is_not_run(tmp_path, printed):
    page = tmp_path / "page.md"
    page.write_text('<!-- skip: next "needs two GPUs" -->\n```python\n1 / 0\n```\n')
    skip, example = blocks.document_of(page, printed)
    skip.evaluate()
    with pytest.raises(unittest.SkipTest, match="needs two GPUs"):
        example.evaluate()
