"""The files of a text, and their documents, read piece by piece: files may be larger than memory."""

from __future__ import annotations

import errno
import os
import stat
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, NoReturn

from triton_lstm.settings import UsageError

CHUNK = 1 << 18  # bytes of a read; the tokens of documents longer than that depend on it
LONGEST = 4  # bytes of a UTF-8 character


class Source(NamedTuple):
    """A file with text, as it was found."""

    path: str  # absolute
    size: int
    mtime_ns: int


class Piece(NamedTuple):
    """Bytes of a document, which follow those of the piece before; `ends` says whether the document does."""

    content: bytes
    ends: bool


def find_sources(text: Sequence[str]) -> list[Source]:
    """The files that are not empty, of files and folders with all that is in them; each file once, and in order.

    In folders, hidden files and what is not a regular file are skipped; links are followed. Without any text: the
    sources of Python's standard library.

    Raises UsageError for what is missing, unreadable or no regular file, for a folder without files, and if all files
    are empty.
    """
    sources: dict[tuple[int, int], Source] = {}
    for name in text or _standard_library():
        try:
            for path, status in _files(os.path.abspath(os.path.expanduser(name))):
                if status.st_size:
                    source = Source(path, status.st_size, status.st_mtime_ns)
                    sources.setdefault((status.st_dev, status.st_ino), source)
        except (OSError, ValueError) as error:  # no system call accepts a name with a null character
            _unreadable(name, error)
    if not sources:
        where = ", ".join(text) or "Python's standard library"
        raise UsageError(f"there is no text in {where}. Give files or folders with text by --text")
    return list(sources.values())


def pieces(source: Source, separator: bytes | None, advance: Callable[[int], object]) -> Iterator[Piece]:
    """Yields the documents of a file in pieces of at most about CHUNK bytes; documents may be empty.

    A document is cut where a line or a word ends, if possible, and never inside of a UTF-8 character. `advance` is
    called with the number of bytes of every read.

    Raises UsageError if the file cannot be read or is not what it was when it was found.
    """
    rest = b""
    margin = len(separator or b"") + LONGEST  # part of it may be at the end of what has been read
    for chunk in _chunks(source):
        advance(len(chunk))
        rest += chunk
        if separator:
            *documents, rest = rest.split(separator)
            yield from (Piece(content, True) for content in documents)
        while len(rest) > CHUNK + margin:
            stop = _break(rest, CHUNK // 2, CHUNK)
            yield Piece(rest[:stop], False)
            rest = rest[stop:]
    yield Piece(rest, True)


def only_document(documents: Iterable[Piece]) -> int | None:
    """The bytes of the only document that is not empty; None if there are several."""
    size, complete = 0, False
    for content, ends in documents:
        if complete and content:
            return None
        size += len(content)
        complete = complete or (ends and size > 0)
    return size


def cut(documents: Iterable[Piece], least: int, most: int) -> Iterator[Piece]:
    """The only document, of more than `most` bytes, as two; the first has from `least` to `most` bytes, if possible."""
    begin = 0
    for content, ends in documents:
        if begin < most <= begin + len(content):
            stop = _break(content, least - begin, most - begin)
            yield Piece(content[:stop], True)
            yield Piece(content[stop:], ends)
        else:
            yield Piece(content, ends)
        begin += len(content)


def _chunks(source: Source) -> Iterator[bytes]:
    count = 0
    try:
        with open(source.path, "rb") as file:
            while (chunk := file.read(CHUNK)) and count <= source.size:
                count += len(chunk)
                yield chunk
            status = os.fstat(file.fileno())
    except OSError as error:
        _unreadable(source.path, error)
    if (count, status.st_size, status.st_mtime_ns) != (source.size, source.size, source.mtime_ns):
        raise UsageError(f"the text {source.path} changed while it was read. Start again when it no longer changes")


def _break(content: bytes, least: int, most: int) -> int:
    """Where to cut, from 1: at the last line break in [least, most], else the last blank, else between characters."""
    for blank in (b"\n", b" "):
        if (found := content.rfind(blank, max(1, least), most + 1)) > 0:
            return found
    near = (*range(most, max(0, most - LONGEST), -1), *range(most + 1, min(most + LONGEST, len(content))))
    inside = [k for k in near if k < len(content) and content[k] & 0xC0 == 0x80]  # bytes 10xxxxxx continue a character
    return next((k for k in near if k not in inside), most)  # else it is not UTF-8


def _files(path: str) -> Iterator[tuple[str, os.stat_result]]:
    status = os.stat(path)
    if stat.S_ISREG(status.st_mode):
        yield path, status
        return
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"the text {path} is neither a regular file nor a folder. Give files or folders")
    found = sorted(_below(path), key=lambda pair: pair[0].split(os.sep))
    if not found:
        raise UsageError(f"the folder {path} has no files, besides hidden ones. Give files or folders with text")
    yield from found


def _below(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    def fail(error: OSError) -> NoReturn:
        raise error

    seen = set()
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above, or a second one to this folder
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = os.path.join(root, name)
            found = None if name.startswith(".") else _status(path)
            if found and stat.S_ISREG(found.st_mode):
                yield path, found


def _status(path: str) -> os.stat_result | None:
    """None for a link that leads nowhere."""
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise


def _standard_library() -> list[str]:
    folder = sysconfig.get_paths()["stdlib"]
    try:
        return sorted(entry.path for entry in os.scandir(folder) if entry.name.endswith(".py") and entry.is_file())
    except OSError:
        return []


def _unreadable(name: str, error: Exception) -> NoReturn:
    where = getattr(error, "filename", None) or name
    why = getattr(error, "strerror", None) or error
    raise UsageError(f"cannot read the text {where}: {why}. Give readable files or folders by --text") from None
