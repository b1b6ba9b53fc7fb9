"""Text as tokens in one memory-mapped file, made once and kept in a cache; its training and its held-out part."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from triton_lstm.settings import UsageError
from triton_lstm.system.terminal import Bar
from triton_lstm.training.config import Data
from triton_lstm.training.order import random_numbers
from triton_lstm.training.text.folder_cache import cache_folder, cached
from triton_lstm.training.text.sources import Source, cut, find_sources, only_document, pieces
from triton_lstm.training.text.token_file import FORMAT, TokenFile, write_token_file
from triton_lstm.training.text.vocabulary import read_vocabulary

SPLIT = 2024  # the key of the order in which documents are held out, the same for every run
BAR_S = 3.0  # without a progress bar until then
BAR: Any = {"unit": "B", "unit_scale": True, "leave": False}


@dataclass(frozen=True, eq=False)
class Documents:
    """Some documents of a corpus.

    Args:
        starts, stops: (n) int64: document k is tokens[starts[k] : stops[k]] of the corpus.
        source_bytes: the bytes of their text.
    """

    starts: np.ndarray
    stops: np.ndarray
    source_bytes: int

    @property
    def tokens(self) -> int:
        """The number of tokens, with the `end` that begins each document."""
        return int((self.stops - self.starts).sum())


class Corpus(TokenFile):
    """A token file of which a share is held out. Pickles as the folder's path and the share."""

    def __init__(self, folder: Path, held_out: float) -> None:
        super().__init__(folder)
        self.held_out = held_out

    def __reduce__(self) -> tuple[type[Corpus], tuple[Path, float]]:
        return Corpus, (self.folder, self.held_out)

    def split(self) -> tuple[Documents, Documents]:
        """The documents to train on and the held-out ones, in the order of the file: the same two for every run.

        Documents are held out in a pseudo-random order until they have the share `held_out` of all tokens; none that
        has more than that, unless all have: then the smallest one. A text that is one document was cut into two.

        Raises UsageError if there are not two documents.
        """
        sizes = np.diff(self.offsets)
        if len(sizes) < 2:
            what = f"the text is one document of {len(self.tokens) - 1:,} tokens, too short to hold out a part"
            raise UsageError(f"{what}. Give more --text, or a --separator that is in it")
        chosen = np.zeros(len(sizes), bool)
        if self.about["cut"]:
            chosen[-1] = True
        else:
            wanted = self.held_out * len(self.tokens)
            order = random_numbers(SPLIT).permutation(len(sizes))
            order = order[sizes[order] <= wanted]
            count = 1 + int(np.searchsorted(np.cumsum(sizes[order]), wanted))
            chosen[order[: min(count, len(sizes) - 1)] if len(order) else np.argmin(sizes)] = True
        return self._documents(np.flatnonzero(~chosen)), self._documents(np.flatnonzero(chosen))

    def _documents(self, indices: np.ndarray) -> Documents:
        return Documents(self.offsets[indices], self.offsets[indices + 1], int(self.sizes[indices].sum()))


def open_corpus(data: Data) -> Corpus:
    """The tokens of a text, from the cache or encoded now.

    Every file is a document, or several with a separator; documents without tokens are left out. If the text is one
    document, it is encoded as two, of which the second one is held out.

    Raises UsageError for a text, a tokenizer or a cache folder that cannot be used, and for a text that changes
    meanwhile.
    """
    vocabulary = read_vocabulary(data.tokenizer)
    separator = None if data.separator is None else data.separator.encode()
    sources = find_sources(data.text)
    facts: list[Any] = [FORMAT, vocabulary.digest, data.separator, *sources]
    if len(sources) == 1:
        facts.append(data.held_out)  # where the text may be cut
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def make(folder: Path) -> None:
        with Bar(desc="tokens", total=sum(source.size for source in sources), delay=BAR_S, **BAR) as bar:
            documents = itertools.chain.from_iterable(pieces(source, separator, bar.update) for source in sources)
            place = _place_to_cut(sources, separator, data.held_out)
            write_token_file(
                folder,
                cut(documents, *place) if place else documents,
                vocabulary,
                cut=bool(place),
                text=data.text,
                tokenizer=data.tokenizer,
                separator=data.separator,
            )

    return cached(cache_folder(data.cache) / key, lambda folder: Corpus(folder, data.held_out), make)


def _place_to_cut(sources: Sequence[Source], separator: bytes | None, held_out: float) -> tuple[int, int] | None:
    """The least and most bytes before the held-out part of a text that is one document; None if it is not."""
    if len(sources) > 1:
        return None
    size = sources[0].size
    if separator is not None:
        size = only_document(pieces(sources[0], separator, lambda count: None)) or 0
    if size < 2:
        return None
    most = min(size - 1, max(1, round(size * (1 - held_out))))
    return most - min(most, size - most) // 2, most
