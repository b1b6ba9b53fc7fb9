"""The Python blocks of docs/ run, each page in order; those that claim something check it."""

import re
from pathlib import Path

import pytest
import torch

PAGES = [page for page in sorted((Path(__file__).parents[1] / "docs").glob("*.md")) if "```python" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of(page, interpreter):
    torch.manual_seed(0)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, page.name, "exec"), names)


def test_there_are_pages():
    assert [page.name for page in PAGES] == ["state.md"]
