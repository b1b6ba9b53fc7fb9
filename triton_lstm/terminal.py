"""What a terminal is sent: text without control characters, tables and lines as wide as it is, progress."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    import pandas as pd

WIDEST, NARROWEST = 400, 20  # of the output
GAP = 2  # between two columns
WORD, TEXT = 34, 20  # so much of a word is kept in one piece, and so wide is a text where a column may be left out
SLIMMEST = 6  # of a column whose words must be cut
EVERY_S = 30.0  # between two lines of progress where the output is no terminal; at first less


def columns() -> int:
    """Of the terminal or as COLUMNS says; of output that is no terminal, as many as are needed."""
    found = shutil.get_terminal_size((WIDEST, 24)).columns or WIDEST
    return max(NARROWEST, min(found, WIDEST))


def escaped(text: str) -> str:
    """Without what a terminal would obey: control characters and the like are written as in Python's source."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain(value: object) -> str:
    """A value as one line: of numbers four digits, nothing of NaN."""
    if isinstance(value, float):
        return "" if value != value else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return escaped(" ".join(str(value).split()))


def spaced(name: str) -> str:
    """A column's or a picture's name as words; the product keeps its own."""
    return name.replace("_", " ").replace("triton lstm", "triton_lstm")


def sentence(text: str) -> str:
    """With one full stop, whether the text brought its own or not; a question keeps its mark."""
    bare = text.rstrip(" .")
    return bare if bare.endswith(("?", "!")) else f"{bare}."


def say(text: str, indent: str = "") -> None:
    """Prints a line, broken between words where the output is narrow; `indent` begins what follows."""
    line = escaped(text)
    options: Any = dict(subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    print("\n".join(textwrap.wrap(line, columns(), **options)) or line, flush=True)


def print_table(
    frame: pd.DataFrame,
    title: str | None = None,
    keep: Collection[str] | None = None,
    style: Callable[[Sequence[str]], str | None] = lambda row: None,
) -> None:
    """Prints a frame as wide as the output is.

    keep: columns that are always there, whole or folded (default: all). The others are there as far as there is room,
    in their order, unless they are empty; those left out are named. style: of a row, by its texts.
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
    """The width of every column, header first; 0 for one that is left out.

    A column of text may be folded, down to its longest word. Only where what is kept has no room are words cut, those
    of sentences before names.
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
    cut = [SLIMMEST if folds else some for folds, some in zip(sentences, least, strict=True)]
    for floors in (least, cut, [SLIMMEST] * len(widths)):
        while spare() < 0 and (wide := [k for k, width in enumerate(widths) if width > floors[k]]):
            widths[max(wide, key=lambda k: widths[k])] -= 1
    return widths


class Bar(tqdm):
    """tqdm's bar in a terminal; elsewhere a line at the start, now and then, and at the end."""

    _time: Callable[[], float]  # tqdm's

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._lines = not sys.stderr.isatty()
        self._told, self._wait = 0.0, 0.5
        if self._lines:
            kwargs |= {"file": _Lines(), "miniters": 1}
        super().__init__(*args, **kwargs)

    def refresh(self, *args: Any, **kwargs: Any) -> None:
        if self._lines:
            now = self._time()
            if now - self._told < self._wait:
                return
            self._told, self._wait = now, min(2 * self._wait, EVERY_S)
        super().refresh(*args, **kwargs)


class _Lines:
    """Standard error, a line for every frame of a bar."""

    def write(self, text: str) -> None:
        if frame := text.strip():
            sys.stderr.write(frame + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
