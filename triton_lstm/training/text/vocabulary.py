"""Text as token ids, and back: every byte is a token, or a tokenizer finds them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from triton_lstm.settings import UsageError, require

BYTES = 256
DTYPES = np.dtype("<u2"), np.dtype("<u4")  # of stored ids


class Vocabulary:
    """The ids of tokens. Pickles as the content of the tokenizer's file.

    Args:
        tokenizer: the content of a file of the `tokenizers` package; None: every byte is a token.

    Attributes:
        size: the number of ids, the classes of a model.
        end: the id before every document, the last one; no text is encoded to it.
        dtype: of stored ids, uint16 or uint32.
        tokenizer: as given.
        digest: identifies the vocabulary.

    Raises:
        UsageError: without the `tokenizers` package, or if the content is not one of its files.
    """

    def __init__(self, tokenizer: bytes | None = None) -> None:
        self.tokenizer = tokenizer
        self.digest = "bytes" if tokenizer is None else hashlib.sha256(tokenizer).hexdigest()
        self._tokenizer = None if tokenizer is None else _parsed(tokenizer)
        self.end = BYTES
        if self._tokenizer:
            ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
            self.end = max(self._tokenizer.get_vocab_size(with_added_tokens=True), max(ids, default=-1) + 1)
        self.size = self.end + 1
        if self.size > 1 << 32:
            raise _MalformedError(f"an id is {self.end - 1}, and more than 32 bits")
        self.dtype = DTYPES[self.size > 1 << 16]

    def __reduce__(self) -> tuple[type[Vocabulary], tuple[bytes | None]]:
        return Vocabulary, (self.tokenizer,)

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of a text (n), without `end`. Raises UsageError if the tokenizer cannot encode it."""
        return self.encode_all([text.encode(errors="replace") if isinstance(text, str) else text])[0]

    def encode_all(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each text, encoded in parallel; a tokenizer reads invalid UTF-8 as U+FFFD. Raises as `encode`."""
        if not self._tokenizer:
            return [np.frombuffer(text, np.uint8).astype(self.dtype) for text in texts]
        # The tokenizer would warn in every process forked later, none of which encodes
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        try:
            encodings = self._tokenizer.encode_batch_fast(
                [text.decode(errors="replace") for text in texts], add_special_tokens=False
            )
        except Exception as error:
            why = f"the tokenizer cannot encode the text: {_first_line(error)}"
            raise UsageError(f"{why}. Give a tokenizer with an unknown token or with all bytes") from None
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, with a line break for `end` and U+FFFD for what is not UTF-8. Never raises."""
        parts = []
        for in_text, group in groupby(map(int, ids), lambda token: 0 <= token < self.end):
            tokens = list(group)
            parts.append(self._decoded(tokens) if in_text else "\n" * len(tokens))
        return "".join(parts)

    def _decoded(self, ids: list[int]) -> str:
        if not self._tokenizer:
            return bytes(ids).decode(errors="replace")
        try:
            return self._tokenizer.decode(ids, skip_special_tokens=False)
        except Exception:  # a decoder need not accept every sequence that a model can write
            return " ".join(self._tokenizer.id_to_token(token) or "\ufffd" for token in ids)


def read_vocabulary(tokenizer: str | Path | None) -> Vocabulary:
    """The vocabulary of a tokenizer's file; of bytes without one.

    Raises UsageError without the `tokenizers` package, or if the file is missing, unreadable or malformed.
    """
    if tokenizer is None:
        return Vocabulary()
    try:
        path = Path(os.path.expanduser(tokenizer))
        if path.exists() and not path.is_file():
            raise UsageError(f"the tokenizer {path} is not a regular file. Give a file of the tokenizers package")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read the tokenizer {tokenizer}: {why}. Give a readable file") from None
    try:
        return Vocabulary(content)
    except _MalformedError as error:
        what = f"{tokenizer} is not a file of the tokenizers package ({error})"
        raise UsageError(f"{what}. Give one that Tokenizer.save wrote, often named tokenizer.json") from None


class _MalformedError(UsageError):
    pass


def _parsed(content: bytes) -> Any:
    require("tokenizers")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(content.decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except Exception as error:
        raise _MalformedError(_first_line(error)) from None
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
