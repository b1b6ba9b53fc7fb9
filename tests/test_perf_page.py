"""The page of results in a browser: Debian's chromium, headless, where there is one."""

import os
import shutil

import pytest

pytest.importorskip("pandas")
from frames import make

from triton_lstm.perf.cases import Case
from triton_lstm.perf.report import write_report
from triton_lstm.perf.summary import summarize

FLAGS = "--no-sandbox --disable-gpu --no-first-run"
FLAGS += " --disable-background-networking --disable-component-update --disable-sync"


def without(what):
    """Skips, but fails where TRITON_LSTM_BROWSER=1 says that the browser must be there."""
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
    """The report of every kind of row: wins, losses, a long reason, long words, pictures."""
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
    # Nothing but a table that scrolls by itself is wider than the page
    beyond = """Array.from(document.querySelectorAll("body *:not(.wide *)"), e => e.getBoundingClientRect().right)"""
    assert max(page.evaluate(beyond)) <= width
    # The first columns stand beside each other in one line, header and cells alike
    heights = page.evaluate("Array.from(document.querySelectorAll('td.name'), e => e.getBoundingClientRect().height)")
    lines = page.evaluate("parseFloat(getComputedStyle(document.querySelector('td.name')).lineHeight)")
    names = page.evaluate("Array.from(document.querySelectorAll('td.name'), e => getComputedStyle(e).whiteSpace)")
    assert set(names) == {"nowrap"} and min(heights) < 2 * lines
    page.close()
