"""The reports of results: markup in cells is escaped; in a browser, if Debian's chromium is installed."""

import math
import os
import re
import shutil
import warnings

import pytest

pytest.importorskip("pandas")
import pandas as pd
from frames import OURS, make

from triton_lstm.perf import report
from triton_lstm.perf.cases import Case
from triton_lstm.perf.report import to_markdown, write_report
from triton_lstm.perf.summary import summarize
from triton_lstm.system import terminal

FLAGS = "--no-sandbox --disable-gpu --no-first-run"
FLAGS += " --disable-background-networking --disable-component-update --disable-sync"


ODD = """<script>alert(1)</script> | `x` [a](http://b) ![i](j) *b* _e_ a_b ~~s~~ $x_{$ &amp; \\| \x1b[31m\x9b2J [/red] $
# 1. x"""


def odd_frame(text=ODD):
    """A frame with this text in every text column."""
    cases = [Case("bf16", T=100, B=8, H=h) for h in (64, 128)]
    frame = make([2.0, 0.5], cases)
    bad = frame.iloc[[0]].assign(status="failed", reason=text, mode="all", ms=math.nan)
    ours = frame["provider"] == OURS
    frame = pd.concat([frame.assign(provider=frame["provider"].mask(ours & (frame["H"] == 64), text)), bad])
    for name in (
        "algorithm",
        "precision",
        "why",
        "gpu",
        "driver",
        "torch",
        "triton",
        "cudnn",
        "commit",
        "sources",
        "date",
    ):
        frame[name] = text
    return frame.assign(case=frame["case"].astype(str) + text)


def test_no_cell_of_a_csv_is_markup_in_markdown():
    markdown_it = pytest.importorskip("markdown_it")
    text = to_markdown(summarize(odd_frame())).partition("## Columns")[0]
    renderer = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    shown, cells = terminal.plain(ODD), []
    for token in renderer.parse(text):
        assert token.type not in ("html_block", "hr", "fence", "code_block")
        for child in token.children or []:
            assert child.type in ("text", "text_special")
        if token.children:
            cells.append("".join(child.content for child in token.children))
    assert sum(shown in cell for cell in cells) > 20 and "\x1b" not in text and "\x9b" not in text
    assert f"{shown}, ms" in cells and any(cell.endswith(f": {shown}") for cell in cells)
    assert cells.count("Not measured, and why") == 1 and len([c for c in cells if c.startswith("# 1")]) == 0


@pytest.mark.parametrize("first", ["# x", "- x", "+ x", "1. x", "12) x", "===", "---", "> x", "~~~", "```"])
def test_no_gpu_begins_a_block_of_markdown(first):
    markdown_it = pytest.importorskip("markdown_it")
    text = to_markdown(summarize(make([2.0]).assign(gpu=first)))
    tokens = markdown_it.MarkdownIt("commonmark").parse(text)
    assert [token.type for token in tokens[3:5]] == ["paragraph_open", "inline"]
    assert "".join(child.content for child in tokens[4].children).startswith(f"{first}, driver 1")


def test_odd_cells_everywhere_else(tmp_path, capsys, monkeypatch):
    frame = odd_frame()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of matplotlib's mathematics and fonts
        assert len(write_report(frame, summarize(frame), tmp_path)) > 3
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script" in page and "\x1b" not in page
    monkeypatch.setenv("COLUMNS", "400")
    report.print_summary(summarize(frame))
    out = capsys.readouterr().out
    assert out.count("[/red]") > 5 and all(c.isprintable() or c == "\n" for c in out)


def test_tables_of_the_page(tmp_path):
    """Every row is as long as the header, no column is empty, headers are aligned, nothing is shortened."""
    frame = odd_frame("a reason of very many words, which goes on and on and is not shortened to fifty letters at all")
    write_report(frame, summarize(frame), tmp_path)
    page = (tmp_path / "report.html").read_text()
    tables = re.findall("<table>(.*?)</table>", page, flags=re.DOTALL)
    assert len(tables) == 5 and "at all</td>" in page and "..." not in page
    for table in tables:
        header, *rows = [
            re.findall(r"<t[hd](?: class=\"(\w+)\")?>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]
        ]
        assert rows and {len(row) for row in rows} == {len(header)}
        for k, (kind, _) in enumerate(header):
            assert any(row[k][1] for row in rows) and {row[k][0] for row in rows} <= {kind, "wins", "LOSES"}


def without(what):
    """Skips without a browser, but fails if TRITON_LSTM_BROWSER=1."""
    (pytest.fail if os.environ.get("TRITON_LSTM_BROWSER") == "1" else pytest.skip)(f"needs {what}")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        without("playwright")
    program = shutil.which("chromium") or without("chromium")
    profile = tmp_path_factory.mktemp("profile")
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=program, headless=True, args=FLAGS.split(), timeout=300_000
        )
        context.set_default_timeout(300_000)
        yield context
        context.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A report with every kind of row: wins, losses, a long reason, long words, plots."""
    cases = [Case("bf16", T=t, B=b, H=h, bidirectional=True) for t in (128, 1024) for b in (8, 64) for h in (64, 256)]
    frame = make([0.5 + k for k in range(8)], cases, gpu="Imaginary-" + "1" * 300)
    bad = (frame["case"] == cases[0].name) & (frame["provider"] == "triton_lstm")
    frame.loc[bad, ["status", "reason"]] = ["failed", "RuntimeError: " + "a text of many words " * 20 + "x" * 300]
    folder = tmp_path_factory.mktemp("page")
    write_report(frame, summarize(frame), folder)
    return folder / "report.html"


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_renders(width, browser, page_file):
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url[:200]))
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(page_file.as_uri())
    assert said == []
    assert page.evaluate("innerWidth") == width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.compatMode") == "CSS1Compat"
    images = page.evaluate("Array.from(document.images, image => [image.complete, image.naturalWidth, image.width])")
    assert len(images) == 4 and all(done and natural > 100 and 100 < wide < width for done, natural, wide in images)
    # Nothing but scrollable tables is wider than the page
    beyond = """Array.from(document.querySelectorAll("body *:not(.wide *)"), e => e.getBoundingClientRect().right)"""
    assert max(page.evaluate(beyond)) <= width
    # The first columns are next to each other on one line, header and cells alike
    heights = page.evaluate("Array.from(document.querySelectorAll('td.name'), e => e.getBoundingClientRect().height)")
    lines = page.evaluate("parseFloat(getComputedStyle(document.querySelector('td.name')).lineHeight)")
    names = page.evaluate("Array.from(document.querySelectorAll('td.name'), e => getComputedStyle(e).whiteSpace)")
    assert set(names) == {"nowrap"} and min(heights) < 2 * lines
    page.close()
