"""Token files: the ids of all documents in one file, which is memory-mapped."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from triton_lstm.settings import UsageError
from triton_lstm.training.text.sources import Piece
from triton_lstm.training.text.vocabulary import DTYPES, Vocabulary

FORMAT = 1  # raise it if a change makes token files different
TOKENS, OFFSETS, SIZES, TOKENIZER, ABOUT = "tokens.bin", "documents.npy", "bytes.npy", "tokenizer.json", "about.json"
TOGETHER, MANY = (
    1 << 22,
    1 << 15,
)  # bytes, of up to 150 in memory, and pieces that are encoded in parallel


class TokenFile:
    """The tokens of documents.

    Args:
        folder: written by `write_token_file`.

    Attributes:
        tokens: (N) uint16 or uint32, memory-mapped. Every document is `end` and the ids of its text.
        offsets: (n + 1) int64: document k is tokens[offsets[k] : offsets[k + 1]].
        sizes: (n) int64: bytes of each document's text.
        end: the id that begins a document.
        about: what `write_token_file` noted, and its extra entries.
        digest: identifies documents, their order and the vocabulary, wherever their files are.

    Raises:
        OSError, ValueError, KeyError, TypeError, EOFError: if the folder does not exist or is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
        if not isinstance(self.about, dict) or self.about["format"] != FORMAT:
            raise ValueError(f"{folder / ABOUT} is not of format {FORMAT}")
        self.end, self.digest = int(self.about["end"]), str(self.about["digest"])
        if self.about["dtype"] not in [dtype.str for dtype in DTYPES]:  # of objects, bytes would count as addresses
            raise ValueError(f"{folder / ABOUT} has another dtype")
        self.tokens = np.memmap(folder / TOKENS, self.about["dtype"], mode="r")
        self.offsets, self.sizes = (np.load(folder / name, mmap_mode="r") for name in (OFFSETS, SIZES))
        counts = len(self.tokens), len(self.offsets) - 1, len(self.sizes)
        documents = self.about["documents"]
        if counts != (self.about["tokens"], documents, documents) or self.offsets[-1] != len(self.tokens):
            raise ValueError(f"files in {folder} do not have the sizes in {ABOUT}")
        if self.about["tokenized"] and not (folder / TOKENIZER).is_file():
            raise ValueError(f"{folder / TOKENIZER} is missing")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the ids. Raises UsageError without the `tokenizers` package, if it needs it."""
        return Vocabulary((self.folder / TOKENIZER).read_bytes() if self.about["tokenized"] else None)


def write_token_file(folder: Path, documents: Iterable[Piece], vocabulary: Vocabulary, **about: Any) -> None:
    """Writes documents that have tokens into an empty folder; `about` is what else to note, as JSON.

    Raises UsageError if no document has tokens or the tokenizer cannot encode one, and OSError if the folder cannot be
    written.
    """
    digest = hashlib.sha256(vocabulary.digest.encode())
    offsets, sizes = array("q", [0]), array("q")
    count, length, size = 0, 0, 0  # tokens in the file; tokens and bytes of the document so far
    end = np.array([vocabulary.end], vocabulary.dtype)
    with open(folder / TOKENS, "wb") as file:
        for batch in _batches(documents):
            block = []
            encoded = vocabulary.encode_all([piece.content for piece in batch])
            for (content, ends), ids in zip(batch, encoded, strict=True):
                if len(ids):
                    block += [ids] if length else [end, ids]
                    length += len(ids) + (not length)
                size += len(content)
                if ends:
                    if length:
                        count += length
                        offsets.append(count)
                        sizes.append(size)
                    length, size = 0, 0
            if block:
                data = np.concatenate(block).tobytes()
                digest.update(data)
                file.write(data)
    if not count:
        raise UsageError("no token is in the text. Give files or folders with more text by --text")
    digest.update(offsets.tobytes())
    np.save(folder / OFFSETS, np.array(offsets, np.int64))
    np.save(folder / SIZES, np.array(sizes, np.int64))
    if vocabulary.tokenizer is not None:
        (folder / TOKENIZER).write_bytes(vocabulary.tokenizer)
    noted = {
        "format": FORMAT,
        "digest": digest.hexdigest(),
        "tokens": count,
        "documents": len(sizes),
        "bytes": sum(sizes),
        "dtype": vocabulary.dtype.str,
        "end": vocabulary.end,
        "tokenized": vocabulary.tokenizer is not None,
    }
    (folder / ABOUT).write_text(json.dumps(about | noted, indent=2) + "\n")


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    total = 0
    for piece in pieces:
        batch.append(piece)
        total += len(piece.content)
        if total >= TOGETHER or len(batch) >= MANY:
            yield batch
            batch, total = [], 0
    yield batch
