"""Reports of results: a table in the terminal, Markdown, an HTML page with embedded plots, PNG files."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from triton_lstm.perf.diff import FASTER, LOST, SLOWER
from triton_lstm.perf.plots import draw_all
from triton_lstm.perf.results import HELP
from triton_lstm.perf.summary import EVEN, LOSES, WINS, Summary
from triton_lstm.settings import UsageError
from triton_lstm.system.terminal import plain, print_table, say, spaced

SHORT = ["case", "mode", "verdict", "speedup", "ms", "nn.LSTM ms", "nn.LSTM algorithm", "us_per_step", "floor_share"]
STYLES = {WINS: "green", LOSES: "bold red", FASTER: "green", SLOWER: "bold red", LOST: "bold red"}
# Markup inside a line of Markdown, and at its start
ACTIVE = re.compile(r"[\\`*\[\]<>&|$~]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.")
BEGINS = re.compile(r"^(?:[#+=-]|\d+(?=[.)]))")

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>triton_lstm: measurements</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; }
body { overflow-wrap: anywhere; } .wide { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; font-size: 13px; overflow-wrap: normal; }
td, th { border: 1px solid #ccc; padding: 2px 8px; text-align: left; vertical-align: top; } th { background: #f4f4f4; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.name { white-space: nowrap; } .text { min-width: 14em; }
.wins { background: #e3f5e1; } .LOSES { background: #fbdfdd; } img { max-width: 100%; }
</style>
<h1>triton_lstm: measurements</h1>
{% macro show(table) %}{% if table.rows %}<div class="wide"><table>
<tr>{% for name, kind in table.columns %}<th{% if kind %} class="{{ kind }}"{% endif %}>{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for text, kind in row %}<td{% if kind %} class="{{ kind }}"{% endif %}>{{ text }}</td>
{%- endfor %}</tr>
{% endfor %}</table></div>{% else %}<p>None.</p>{% endif %}{% endmacro %}
{% for line in headline %}<p>{{ line }}</p>{% endfor %}
<h2>Against nn.LSTM</h2>{{ show(tables.table) }}
<h2>Plots</h2>
{% for name, image in images %}<h3>{{ name }}</h3><img alt="{{ name }}" src="data:image/png;base64,{{ image }}">
{% else %}<p>There are too few cases for a plot.</p>{% endfor %}
<h2>All providers</h2>{{ show(tables.all_times) }}{{ show(tables.providers) }}
<h2>Not measured, and why</h2>{{ show(tables.unmeasured) }}
<h2>The floor of this device</h2>{{ show(tables.floor) }}
<h2>Columns</h2><dl>{% for name, text in help %}<dt><code>{{ name }}</code></dt><dd>{{ text }}</dd>{% endfor %}</dl>
</html>
"""


def write_report(frame: pd.DataFrame, summary: Summary, folder: Path) -> list[Path]:
    """Writes report.md, report.html and the plots to `folder`; returns the files."""
    plots = draw_all(frame, folder)
    markdown, page = folder / "report.md", folder / "report.html"
    markdown.write_text(to_markdown(summary, [path.name for path in plots]), encoding="utf-8")
    page.write_text(_to_html(summary, plots), encoding="utf-8")
    return [markdown, page, *plots]


def to_markdown(summary: Summary, plots: Sequence[str] = ()) -> str:
    """The whole report; plots: names of files in the same folder."""
    parts = ["# Measurements", *(BEGINS.sub(_entity, _escaped(line)) for line in summary.headline)]
    parts += ["## Against nn.LSTM", _markdown(summary.table)]
    parts += [f"![{Path(name).stem}]({name})" for name in plots]
    parts += ["## All providers", _markdown(summary.all_times), _markdown(summary.providers)]
    parts += ["## Not measured, and why", _markdown(summary.unmeasured)]
    parts += ["## The floor of this device", _markdown(summary.floor)]
    parts += ["## Columns", "\n".join(f"- `{name}`: {text}" for name, text in HELP.items())]
    return "\n\n".join(parts) + "\n"


def print_summary(summary: Summary) -> None:
    """Prints the tables; green where triton_lstm is faster, red where nn.LSTM is."""
    print_table(summary.table[SHORT], keep=SHORT[:3], style=verdict_style)
    if not summary.table["verdict"].isin([WINS, EVEN, LOSES]).any():
        print_table(summary.all_times, keep=["case", "mode"])
    if len(summary.unmeasured):
        print_table(summary.unmeasured, title="Not measured, and why", keep=["provider", "status", "reason"])
    for line in summary.headline:
        say(line)


def verdict_style(row: Sequence[str]) -> str | None:
    """The style of a row that contains a verdict."""
    return next((STYLES[text] for text in row if text in STYLES), None)


def print_columns(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Prints the named columns of every row. Raises UsageError for an unknown one."""
    unknown = [name for name in columns if name not in frame.columns]
    if unknown:
        raise UsageError(f"there is no column {unknown[0]!r}. Available: {', '.join(frame.columns)}")
    print_table(frame[list(columns)], style=verdict_style)


def _texts(frame: pd.DataFrame) -> pd.DataFrame:
    """The cells as text, without empty columns."""
    texts = pd.DataFrame({name: [plain(value) for value in frame[name]] for name in frame.columns}, dtype=object)
    return texts.loc[:, (texts != "").any()]


def _entity(found: re.Match[str]) -> str:
    return "".join(f"&#{ord(c)};" for c in found[0])


def _escaped(text: str) -> str:
    """Text for a line of Markdown or a table cell, with all markup escaped."""
    return ACTIVE.sub(_entity, plain(text))


def _markdown(frame: pd.DataFrame) -> str:
    texts = _texts(frame)
    if texts.empty:
        return "None."
    align = ["right" if _is_number(frame[name]) else "left" for name in texts.columns]
    texts = texts.map(_escaped).rename(columns=_escaped)
    return str(texts.to_markdown(index=False, disable_numparse=True, colalign=align))


def _kind(name: str, column: pd.Series, texts: pd.Series) -> str:
    """The CSS class of a column."""
    if _is_number(column):
        return "number"
    return "name" if name in ("case", "mode", "provider") else "text" if texts.str.len().max() > 40 else ""


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column)


def _to_html(summary: Summary, plots: Sequence[Path]) -> str:
    def table(frame: pd.DataFrame) -> dict[str, Any]:
        texts = _texts(frame)
        kinds = [_kind(name, frame[name], texts[name]) for name in texts.columns]
        columns = [spaced(plain(name)) for name in texts.columns]
        rows = [
            [(text, text if text in STYLES else kind) for text, kind in zip(row, kinds, strict=True)]
            for row in texts.itertuples(index=False)
        ]
        return {"columns": list(zip(columns, kinds, strict=True)), "rows": rows}

    tables = {
        name: table(getattr(summary, name)) for name in ("table", "all_times", "providers", "unmeasured", "floor")
    }
    images = [(spaced(path.stem), base64.b64encode(path.read_bytes()).decode()) for path in plots]
    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    return template.render(headline=map(plain, summary.headline), tables=tables, images=images, help=HELP.items())
