"""Terminal output: escaped text, tables and lines that fit the width, progress bars."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    import pandas as pd

WIDEST, NARROWEST = 400, 20  # limits of the output's width
GAP = 2  # between two columns
WORD, TEXT = 34, 20  # longest word that is not broken; width that a text column gets before others are dropped
NARROWEST_COLUMN = 6  # width of a column whose words must be broken
EVERY_S = 30.0  # between two progress lines if the output is not a terminal; shorter at first


def columns() -> int:
    """The width of the terminal, or COLUMNS; unlimited, up to WIDEST, if the output is not a terminal."""
    found = shutil.get_terminal_size((WIDEST, 24)).columns or WIDEST
    return max(NARROWEST, min(found, WIDEST))


def escaped(text: str) -> str:
    """Control characters and other unprintable ones, which a terminal would obey, as Python escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain(value: object) -> str:
    """A value on one line: floats with four digits, NaN as an empty string."""
    if isinstance(value, float):
        return "" if value != value else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return escaped(" ".join(str(value).split()))


def spaced(name: str) -> str:
    """A column's or a picture's name with spaces, except in triton_lstm."""
    return name.replace("_", " ").replace("triton lstm", "triton_lstm")


def sentence(text: str) -> str:
    """The text with exactly one full stop; a question or exclamation mark is kept."""
    bare = text.rstrip(" .")
    return bare if bare.endswith(("?", "!")) else f"{bare}."


def say(text: str, indent: str = "") -> None:
    """Prints a line, wrapped between words to the output's width; `indent` starts the following lines."""
    line = escaped(text)
    options: Any = dict(subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    print("\n".join(textwrap.wrap(line, columns(), **options)) or line, flush=True)


def print_table(
    frame: pd.DataFrame,
    title: str | None = None,
    keep: Collection[str] | None = None,
    style: Callable[[Sequence[str]], str | None] = lambda row: None,
) -> None:
    """Prints a DataFrame, fitted to the output's width.

    keep: columns that are always printed, folded if necessary (default: all). The others are printed in order while
    there is room, unless they are empty; a note lists the omitted ones. style: the style of a row, from its texts.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = [plain(name) for name in frame.columns]
    texts = [[plain(value) for value in frame.iloc[:, k]] for k in range(len(names))]
    kept = [keep is None or name in keep for name in frame.columns]
    full = [k for k in range(len(names)) if kept[k] or any(texts[k])]
    headers = [spaced(name) for name in names]
    room = columns()
    widths = _layout([[headers[k], *texts[k]] for k in full], [kept[k] for k in full], room)
    shown = [k for k, width in zip(full, widths, strict=True) if width]
    table = Table(
        title=None if title is None else Text(escaped(title)),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, GAP - 1, 0, 0),
        header_style="bold",
    )
    for k, width in zip(full, widths, strict=True):
        if width:
            justify: Any = "right" if frame.dtypes.iloc[k].kind in "iuf" else "left"
            table.add_column(Text(headers[k]), justify=justify, width=width, overflow="fold")
    for row in range(len(frame)):
        cells = [texts[k][row] for k in shown]
        table.add_row(*map(Text, cells), style=style(cells))
    Console(width=room, height=24).print(table)
    if left := [headers[k] for k in full if k not in shown]:
        say(f"no room in {room} columns for: {', '.join(left)}")


def _layout(texts: list[list[str]], kept: list[bool], room: int) -> list[int]:
    """The width of every column of `texts` (header first); 0 for an omitted one.

    Text columns may be folded, down to their longest word. Words are broken only if the kept columns do not fit
    otherwise, in sentences first and in names last.
    """
    from rich.cells import cell_len

    wanted = [max(map(cell_len, column)) for column in texts]
    least = [min(WORD, max(cell_len(word) for text in column for word in text.split() or [""])) for column in texts]
    widest = [max(map(cell_len, column[1:]), default=0) for column in texts]  # without the header
    good = [max(some, min(most, TEXT)) for some, most in zip(least, widest, strict=True)]
    widths = [width if keep else 0 for width, keep in zip(good, kept, strict=True)]

    def spare() -> int:
        return room - sum(widths) - GAP * (sum(width > 0 for width in widths) - 1)

    for k, width in enumerate(good):
        if not widths[k] and width + GAP <= spare():
            widths[k] = width
    for k, width in enumerate(widths):
        if width:
            widths[k] = min(wanted[k], width + max(0, spare()))
    sentences = [any(" " in text for text in column[1:]) for column in texts]
    cut = [NARROWEST_COLUMN if folds else some for folds, some in zip(sentences, least, strict=True)]
    for floors in (least, cut, [NARROWEST_COLUMN] * len(widths)):
        while spare() < 0 and (wide := [k for k, width in enumerate(widths) if width > floors[k]]):
            widths[max(wide, key=lambda k: widths[k])] -= 1
    return widths


class Bar(tqdm):
    """tqdm's bar in a terminal; otherwise a line at the start, at growing intervals, and at the end."""

    silent = False  # of a process that leaves talking to another one
    _time: Callable[[], float]  # tqdm's clock

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"disable": True} if Bar.silent else {}
        self._lines = not sys.stderr.isatty()
        self._printed, self._wait = 0.0, 0.5
        if self._lines:
            kwargs |= {"file": _Lines(), "miniters": 1}
        super().__init__(*args, **kwargs)

    def refresh(self, *args: Any, **kwargs: Any) -> None:
        if self._lines:
            now = self._time()
            if now - self._printed < self._wait:
                return
            self._printed, self._wait = now, min(2 * self._wait, EVERY_S)
        super().refresh(*args, **kwargs)


class _Lines:
    """Standard error, with one line per frame of a bar."""

    def write(self, text: str) -> None:
        if frame := text.strip():
            sys.stderr.write(frame + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
