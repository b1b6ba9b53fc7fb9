"""Batches of tokens: training batches are a pure function of seed and number, so a resumed run gets the same ones."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from triton_lstm.settings import UsageError
from triton_lstm.training.config import Data
from triton_lstm.training.order import random_numbers
from triton_lstm.training.text.corpus import Corpus, Documents

IGNORED = -100  # the target of padding, which PyTorch's losses ignore


class Batch(NamedTuple):
    """One batch.

    Args:
        inputs: (T, B) int64.
        targets: (T, B) int64, the tokens that follow the inputs.
        resets: (T, B) bool, True where a document begins and the state before has to be zero; None without resets.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    resets: torch.Tensor | None

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; the host does not wait for pinned memory."""
        inputs, targets, resets = self
        resets = None if resets is None else resets.to(device, non_blocking=True)
        return Batch(inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True), resets)


class Share(NamedTuple):
    """Of the rows of every batch, those of one process of several: an equal part, in order."""

    rank: int = 0
    size: int = 1

    def of(self, rows: int) -> slice:
        """The part of so many rows."""
        part = rows // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


ALL = Share()


class Streams(Dataset[Batch]):
    """Batches each of which continues where the one before ended: `batch * accumulate` contiguous rows of an epoch.

    An epoch is all documents in an order of its own, one after the other, cut into rows of equal length. Batch
    `step * accumulate + part` has the rows from `part * batch` of a step. In the first step of an epoch all rows begin
    with a reset. What does not fill a row and a step is left out, something else in every epoch.

    All processes together have the rows that one alone would have.

    Args:
        corpus: holds the tokens.
        documents: of the corpus.
        data: batch, seq_len and reset.
        seed: of the order.
        accumulate: batches of a step.
        share: this process's rows of each.

    Attributes:
        steps_per_epoch: in which each token is a target once, or left out.

    Raises:
        UsageError: if there are too few tokens for a step.
    """

    def __init__(
        self, corpus: Corpus, documents: Documents, data: Data, seed: int, accumulate: int = 1, share: Share = ALL
    ) -> None:
        self._corpus, self._documents = corpus, documents
        self._data, self._seed, self._accumulate, self._share = data, seed, accumulate, share
        rows = data.batch * accumulate
        self._length = (documents.tokens - 1) // rows
        self.steps_per_epoch = self._length // data.seq_len
        if not self.steps_per_epoch:
            _too_few(documents, rows * data.seq_len + 1, f"--batch {data.batch}", accumulate, data)
        self._epoch = -1
        self._joined: _Joined

    def __getitem__(self, index: int) -> Batch:
        step, part = divmod(index, self._accumulate)
        epoch, step = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = random_numbers(self._seed, epoch).permutation(len(self._documents.starts))
            self._joined, self._epoch = _Joined(self._corpus, self._documents, order), epoch
        rows = np.arange(part * self._data.batch, (part + 1) * self._data.batch)[self._share.of(self._data.batch)]
        batch = _batch(self._joined, rows * self._length + step * self._data.seq_len, self._data)
        if batch.resets is not None and not step:
            batch.resets[0] = True
        return batch

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_joined"} | {"_epoch": -1}


class Windows(Dataset[Batch]):
    """Batches of windows at random places, which need not be the beginning of a document.

    Arguments and index are those of Streams. Raises UsageError if there are too few tokens for a window.
    """

    def __init__(
        self, corpus: Corpus, documents: Documents, data: Data, seed: int, accumulate: int = 1, share: Share = ALL
    ) -> None:
        self._joined = _Joined(corpus, documents)
        self._data, self._seed, self._accumulate, self._share = data, seed, accumulate, share
        self._places = documents.tokens - data.seq_len
        if self._places < 1:
            _too_few(documents, data.seq_len + 1, "", 1, data)

    def __getitem__(self, index: int) -> Batch:
        step, part = divmod(index, self._accumulate)
        rows = self._data.batch * self._accumulate
        places = random_numbers(self._seed, step).randint(self._places, size=rows, dtype=np.int64)
        return _batch(self._joined, places[part * self._data.batch :][self._share.of(self._data.batch)], self._data)


def load(
    dataset: Streams | Windows, first_step: int, last_step: int, accumulate: int, workers: int, pin: bool
) -> Generator[Batch, None, None]:
    """Yields the batches of the steps from `first_step` to before `last_step`, in order.

    The iterator has to be closed, which ends the workers: they ignore Ctrl-C, SIGTERM and SIGHUP, after which this
    process may still need batches to complete its step. It raises what a worker raises. If one dies, PyTorch
    raises RuntimeError with "DataLoader worker", also outside of the iterator, from a signal handler.

    Args:
        dataset: indexed by the number of a batch.
        first_step, last_step: counted from 0.
        accumulate: batches of a step.
        workers: processes; 0 for none.
        pin: whether batches are copied to pinned memory.
    """

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).pin_memory() if pin else torch.from_numpy(array)

    ending = multiprocessing.RawValue("b", False)  # shared with the workers
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(first_step * accumulate, last_step * accumulate),
        num_workers=workers,
        collate_fn=_as_arrays,
        worker_init_fn=functools.partial(_leave_signals_to_parent, ending),
    )
    try:
        for inputs, targets, resets in loader:
            yield Batch(tensor(inputs), tensor(targets), None if resets is None else tensor(resets))
    except (EOFError, ConnectionError, FileNotFoundError) as error:  # a worker died while it sent a batch
        raise RuntimeError("DataLoader worker died") from error
    finally:
        ending.value = True


def _as_arrays(batch: Any) -> list[np.ndarray | None]:
    """What a worker sends: tensors would go through shared memory, of which containers have little."""
    return [None if tensor is None else tensor.numpy() for tensor in batch]


class HeldOut:
    """All held-out batches, from the first one every time: up to `batch` contiguous rows in steps of `seq_len`.

    Every token but the first is a target once. A row's first input is the last target of the row before. The last batch
    may have fewer steps. Padding has the target -100. The state before the first batch is zero. Of several processes
    all have as many rows.

    Arguments are those of Streams. `len` is the number of batches.
    """

    def __init__(self, corpus: Corpus, documents: Documents, data: Data, share: Share = ALL) -> None:
        self._joined, self._data, self._end = _Joined(corpus, documents), data, corpus.end
        self._targets = documents.tokens - 1
        # Rows shorter than a step would only take context away
        self._length = max(-(-self._targets // data.batch), min(data.seq_len, self._targets))
        rows = -(-self._targets // self._length)
        rows = -(-rows // share.size) * share.size  # the last ones may be padding
        self._rows = np.arange(rows)[share.of(rows)]

    def __len__(self) -> int:
        return -(-self._length // self._data.seq_len)

    def __iter__(self) -> Iterator[Batch]:
        for begin in range(0, self._length, self._data.seq_len):
            steps = np.arange(begin, min(begin + self._data.seq_len, self._length))
            positions = self._rows * self._length + steps[:, None]
            real = positions < self._targets
            inputs = np.where(real, self._joined[np.minimum(positions, self._targets)], self._end)
            targets = np.where(real, self._joined[np.minimum(positions + 1, self._targets)], IGNORED)
            resets = torch.from_numpy(inputs == self._end) if self._data.reset else None
            yield Batch(torch.from_numpy(inputs), torch.from_numpy(targets), resets)


class _Joined:
    """Documents one after the other, as one sequence that is indexed by arrays of positions."""

    def __init__(self, corpus: Corpus, documents: Documents, order: np.ndarray | None = None) -> None:
        chosen = slice(None) if order is None else order
        self._corpus, self._starts = corpus, documents.starts[chosen]
        lengths = documents.stops[chosen] - self._starts
        self._shift = self._starts - (np.cumsum(lengths) - lengths)  # from a position here to one in the corpus
        self._begins = np.cumsum(lengths) - lengths
        self.end = corpus.end

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """The tokens there, int64."""
        document = np.searchsorted(self._begins, positions, side="right") - 1
        return self._corpus.tokens[positions + self._shift[document]].astype(np.int64)


def _batch(joined: _Joined, begins: np.ndarray, data: Data) -> Batch:
    """The batch whose rows begin at these positions."""
    tokens = torch.from_numpy(joined[begins + np.arange(data.seq_len + 1)[:, None]])
    inputs, targets = tokens[:-1], tokens[1:]
    return Batch(inputs, targets, inputs == joined.end if data.reset else None)


def _too_few(documents: Documents, least: int, batch: str, accumulate: int, data: Data) -> None:
    sizes = [batch, f"--accumulate {accumulate}" if accumulate > 1 else "", f"--seq-len {data.seq_len}"]
    wanted = " with ".join(filter(None, sizes))
    what = f"{documents.tokens:,} tokens are too few: a step of {wanted} needs {least:,}"
    raise UsageError(f"{what}. Give more --text, or a smaller --batch or --seq-len")


def _leave_signals_to_parent(ending: Any, worker: int) -> None:
    """A terminal or a scheduler sends them to all processes. A parent that exits sends SIGTERM, and waits."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if ending.value else None)
