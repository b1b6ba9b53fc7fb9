"""Shows results: a table in the terminal, Markdown, a page of HTML with its pictures inside, PNG files."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path

import jinja2
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from triton_lstm.config import UsageError
from triton_lstm.perf.diff import FASTER, LOST, SLOWER
from triton_lstm.perf.plots import draw_all
from triton_lstm.perf.results import HELP
from triton_lstm.perf.summary import EVEN, LOSES, WINS, Summary

SHORT = ["case", "mode", "verdict", "speedup", "ms", "nn.LSTM ms", "nn.LSTM algorithm", "us_per_step", "floor_share"]
STYLES = {WINS: "green", LOSES: "bold red", FASTER: "green", SLOWER: "bold red", LOST: "bold red"}
WIDTH = 400  # at most, of the table where the output is no terminal

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>triton_lstm: measurements</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; } td, th { border: 1px solid #ccc; padding: 2px 8px; }
td { text-align: right; } td:nth-child(-n+3) { text-align: left; }
.wins { background: #e3f5e1; } .LOSES { background: #fbdfdd; } img { max-width: 100%; }
</style>
<h1>triton_lstm: measurements</h1>
{% for line in headline %}<p>{{ line }}</p>{% endfor %}
<h2>Against nn.LSTM</h2>{{ tables.table }}
<h2>Pictures</h2>
{% for name, image in images %}<h3>{{ name }}</h3><img alt="{{ name }}" src="data:image/png;base64,{{ image }}">
{% else %}<p>There are too few cases for a picture.</p>{% endfor %}
<h2>Everyone</h2>{{ tables.everyone }}{{ tables.providers }}
<h2>Not measured, and why</h2>{{ tables.absent }}
<h2>The floor of this device</h2>{{ tables.floor }}
<h2>Columns</h2><dl>{% for name, text in help %}<dt><code>{{ name }}</code></dt><dd>{{ text }}</dd>{% endfor %}</dl>
</html>
"""


def write_report(frame: pd.DataFrame, summary: Summary, folder: Path) -> list[Path]:
    """report.md, report.html and the pictures, in `folder`; returns the files."""
    pictures = draw_all(frame, folder)
    markdown, page = folder / "report.md", folder / "report.html"
    markdown.write_text(to_markdown(summary, [path.name for path in pictures]), encoding="utf-8")
    page.write_text(_to_html(summary, pictures), encoding="utf-8")
    return [markdown, page, *pictures]


def to_markdown(summary: Summary, pictures: Sequence[str] = ()) -> str:
    """The whole report; pictures: names of files beside it."""
    parts = ["# Measurements", *summary.headline]
    parts += ["## Against nn.LSTM", _markdown(summary.table)]
    parts += [f"![{Path(name).stem}]({name})" for name in pictures]
    parts += ["## Everyone", _markdown(summary.everyone), _markdown(summary.providers)]
    parts += ["## Not measured, and why", _markdown(summary.absent)]
    parts += ["## The floor of this device", _markdown(summary.floor)]
    parts += ["## Columns", "\n".join(f"- `{name}`: {text}" for name, text in HELP.items())]
    return "\n\n".join(parts) + "\n"


def print_summary(summary: Summary) -> None:
    """The tables in the terminal; green where triton_lstm is faster, red where nn.LSTM is."""
    wide = not Console().is_terminal or Console().width >= 140
    print_table(summary.table[SHORT if wide else SHORT[:6]])
    if not summary.table["verdict"].isin([WINS, EVEN, LOSES]).any():
        print_table(summary.everyone)
    if len(summary.absent):
        print_table(summary.absent, title="Not measured, and why")
    for line in summary.headline:
        print(line)


def print_table(frame: pd.DataFrame, title: str | None = None) -> None:
    """A table as wide as the terminal, or as it needs to be where the output is none."""
    console = Console()
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console = Console(width=WIDTH)
    console.print(_rich(frame, title))


def print_columns(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """The named columns of every row. Raises UsageError for one that there is not."""
    unknown = [name for name in columns if name not in frame.columns]
    if unknown:
        raise UsageError(f"there is no column {unknown[0]!r}. Columns: {', '.join(frame.columns)}")
    print_table(frame[list(columns)])


def _rich(frame: pd.DataFrame, title: str | None) -> Table:
    table = Table(title=title, header_style="bold")
    texts = _texts(frame)
    for name in frame.columns:
        numeric = pd.api.types.is_numeric_dtype(frame[name])
        table.add_column(name.replace("_", " "), justify="right" if numeric else "left", no_wrap=name == "case")
    for row in texts.itertuples(index=False):
        style = next((STYLES[text] for text in row if text in STYLES), None)
        table.add_row(*(Text(text) for text in row), style=style)
    return table


def _texts(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.apply(lambda column: column.map(_text)) if len(frame) else frame.astype(str)


def _text(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _markdown(frame: pd.DataFrame) -> str:
    if frame.empty:
        return "None."
    texts = _texts(frame).map(lambda text: html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;"))
    return str(texts.to_markdown(index=False, disable_numparse=True))


def _to_html(summary: Summary, pictures: Sequence[Path]) -> str:
    def table(frame: pd.DataFrame) -> str:
        if frame.empty:
            return "<p>None.</p>"
        page = _texts(frame).to_html(index=False, border=0)
        for verdict in STYLES:
            page = page.replace(f"<td>{verdict}</td>", f'<td class="{verdict}">{html.escape(verdict)}</td>')
        return page

    tables = {name: table(getattr(summary, name)) for name in ("table", "everyone", "providers", "absent", "floor")}
    images = [(path.stem.replace("_", " "), base64.b64encode(path.read_bytes()).decode()) for path in pictures]
    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    safe = {name: jinja2.filters.do_mark_safe(text) for name, text in tables.items()}
    return template.render(headline=summary.headline, tables=safe, images=images, help=HELP.items())
