"""Batches, compared with their definition over lists of tokens in memory."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import accumulate as sums
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydantic", reason="the configuration needs pydantic")
import torch
from child import TESTS, python_path
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from texts import corpus_of
from torch.utils.data import DataLoader

from triton_lstm.settings import UsageError
from triton_lstm.training.batches import IGNORED, HeldOut, Streams, Windows, load
from triton_lstm.training.config import Data
from triton_lstm.training.order import random_numbers
from triton_lstm.training.text.corpus import Corpus, Documents

END = 256


def numbered(lengths: list[int]) -> list[bytes]:
    """Documents whose bytes count up, so that places differ."""
    stops = list(sums(lengths))
    counting = bytes(k % 251 for k in range(sum(lengths)))
    return [counting[stop - length : stop] for length, stop in zip(lengths, stops, strict=True)]


def joined(corpus: Corpus, documents: Documents, order: Iterable[int]) -> list[int]:
    """The documents one after the other, in this order."""
    ranges = list(zip(documents.starts, documents.stops, strict=True))
    return [token for k in order for token in corpus.tokens[slice(*ranges[k])].tolist()]


def naive_streams(tokens: list[int], rows: int, T: int) -> list[tuple[list, list]]:
    """Inputs and targets (T, rows) of every step of an epoch."""
    length = (len(tokens) - 1) // rows
    steps = [[[tokens[r * length + s * T + t] for r in range(rows)] for t in range(T + 1)] for s in range(length // T)]
    return [(step[:-1], step[1:]) for step in steps]


LENGTHS = st.lists(st.integers(1, 12), min_size=2, max_size=25)


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, (1 << 32) - 1))
def test_streams(lengths, B, accumulate, T, seed):
    """Two epochs are what the definition says, in any order of access, and no place is a target twice."""
    with tempfile.TemporaryDirectory() as name:
        corpus = corpus_of(Path(name), numbered(lengths))
        documents, _ = corpus.split()
        rows = B * accumulate
        assume((documents.tokens - 1) // rows >= T)
        streams = Streams(corpus, documents, Data(batch=B, seq_len=T), seed, accumulate)
        count = streams.steps_per_epoch
        batches = {m: streams[m] for m in np.random.default_rng(0).permutation(2 * count * accumulate).tolist()}
        for epoch in range(2):
            order = random_numbers(seed, epoch).permutation(len(documents.starts))
            expected = naive_streams(joined(corpus, documents, order), rows, T)
            assert len(expected) == count
            for step, (inputs, targets) in enumerate(expected):
                begin = (epoch * count + step) * accumulate
                parts = [batches[m] for m in range(begin, begin + accumulate)]
                assert torch.cat([part.inputs for part in parts], 1).tolist() == inputs
                assert torch.cat([part.targets for part in parts], 1).tolist() == targets
                resets = torch.cat([part.resets for part in parts], 1)
                known = torch.tensor(inputs) == END
                assert torch.equal(resets[1:], known[1:])
                assert torch.equal(resets[0], known[0] | (step == 0))
                assert all(part.inputs.dtype == part.targets.dtype == torch.int64 for part in parts)


@settings(max_examples=30)
@given(LENGTHS, st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, (1 << 32) - 1))
def test_windows(lengths, B, accumulate, T, seed):
    """Windows of the documents in their order."""
    with tempfile.TemporaryDirectory() as name:
        corpus = corpus_of(Path(name), numbered(lengths))
        documents, _ = corpus.split()
        assume(documents.tokens > T)
        tokens = joined(corpus, documents, range(len(documents.starts)))
        known = {tuple(tokens[k : k + T + 1]) for k in range(len(tokens) - T)}
        split = Windows(corpus, documents, Data(batch=B, seq_len=T), seed, accumulate)
        whole = Windows(corpus, documents, Data(batch=B * accumulate, seq_len=T, reset=False), seed, 1)
        for step in (0, 1, 10**6):
            parts = [split[step * accumulate + a] for a in range(accumulate)]
            batch = whole[step]
            assert batch.resets is None
            assert torch.equal(torch.cat([part.inputs for part in parts], 1), batch.inputs)
            assert torch.equal(torch.cat([part.targets for part in parts], 1), batch.targets)
            assert all(torch.equal(part.resets, part.inputs == END) for part in parts)
            found = torch.cat([batch.inputs, batch.targets[-1:]])
            assert torch.equal(found[1:], batch.targets) and {tuple(row) for row in found.T.tolist()} <= known


def test_windows_are_everywhere(tmp_path):
    """Every place is drawn about equally often, the first and the last one included."""
    corpus = corpus_of(tmp_path, [bytes(range(40)), bytes(range(50, 150))], held_out=0.01)
    documents = corpus.split()[0]
    windows = Windows(corpus, documents, Data(batch=1000, seq_len=4), seed=3)
    counts = torch.bincount(torch.cat([windows[step].inputs[0] for step in range(10)]), minlength=257)
    assert documents.tokens == 101 and counts.count_nonzero() == 97
    assert counts[END] and counts[50 + 95] and not counts[50 + 96 :][:54].any()
    assert counts.max() < 2 * 10_000 / 97


@settings(max_examples=80)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 9))
def test_held_out(lengths, B, T):
    """Every token but the first is a target exactly once, after what precedes it."""
    with tempfile.TemporaryDirectory() as name:
        corpus = corpus_of(Path(name), numbered(lengths))
        _, documents = corpus.split()
        tokens = joined(corpus, documents, range(len(documents.starts)))
        batches = HeldOut(corpus, documents, Data(batch=B, seq_len=T))
        found = list(batches)
        assert len(found) == len(batches) and len({batch.inputs.shape[1] for batch in found}) == 1
        assert all(batch.inputs.shape[0] == T for batch in found[:-1]) and found[-1].inputs.shape[0] <= T
        inputs, targets, resets = (torch.cat(parts) for parts in zip(*found, strict=True))
        assert inputs.shape[1] <= B and torch.equal(resets, inputs == END)
        real = targets != IGNORED
        assert inputs.T[real.T].tolist() == tokens[:-1] and targets.T[real.T].tolist() == tokens[1:]
        assert bool((real[1:] <= real[:-1]).all())  # padding is at the end
        assert bool((inputs[~real] == END).all())
        for batch, again in zip(found, batches, strict=True):
            assert torch.equal(batch.inputs, again.inputs)
        assert all(batch.resets is None for batch in HeldOut(corpus, documents, Data(batch=B, seq_len=T, reset=False)))


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return corpus_of(tmp_path, numbered([30 + k for k in range(50)]))


@pytest.mark.parametrize("kind", [Streams, Windows])
def test_accumulation_is_a_larger_batch(corpus, kind):
    documents = corpus.split()[0]
    parts = kind(corpus, documents, Data(batch=2, seq_len=7), 5, 3)
    whole = kind(corpus, documents, Data(batch=6, seq_len=7), 5, 1)
    for step in range(60):  # more than an epoch
        found = [torch.cat(three, 1) for three in zip(*(parts[3 * step + a] for a in range(3)), strict=True)]
        assert all(map(torch.equal, found, whole[step]))


def same(first, second) -> bool:
    return len(first) == len(second) and all(map(torch.equal, sum(first, ()), sum(second, ())))


@pytest.mark.parametrize("kind", [Streams, Windows])
def test_loader(corpus, kind):
    """Workers change nothing, and a resumed run continues with the same batches."""
    dataset = kind(corpus, corpus.split()[0], Data(batch=2, seq_len=7), 5, 2)
    batches = list(load(dataset, 0, 40, 2, 0, False))
    assert len(batches) == 80 and all(map(torch.equal, batches[9], dataset[9]))
    assert same(batches, list(load(dataset, 0, 40, 2, 2, False)))
    assert same(batches[2 * 33 :], list(load(dataset, 33, 40, 2, 1, False)))
    assert not same(batches[:2], batches[2:4])


def test_loader_without_resets(corpus):
    streams = Streams(corpus, corpus.split()[0], Data(batch=2, seq_len=7, reset=False), 5)
    assert [batch.resets for batch in load(streams, 0, 3, 1, 1, False)] == [None] * 3


def test_seeds_and_epochs_differ(corpus):
    documents = corpus.split()[0]
    streams = [Streams(corpus, documents, Data(batch=2, seq_len=7), seed) for seed in (0, 1)]
    count = streams[0].steps_per_epoch
    firsts = [streams[0][0], streams[1][0], streams[0][count]]
    assert len({tuple(batch.inputs.flatten().tolist()) for batch in firsts}) == 3


@pytest.mark.parametrize("kind", [Streams, Windows])
def test_what_spawned_workers_get(tmp_path, kind):
    """A dataset without its tokens."""
    corpus = corpus_of(tmp_path, [b"x" * 50_000, bytes(range(256)) * 400])
    dataset = kind(corpus, corpus.split()[0], Data(batch=2, seq_len=7), 5)
    dataset[0]
    content = pickle.dumps(dataset)
    assert len(content) < 4000
    assert same([pickle.loads(content)[3]], [dataset[3]])


def test_spawn(corpus):
    streams = Streams(corpus, corpus.split()[0], Data(batch=2, seq_len=7), 5)
    loader = DataLoader(streams, batch_size=None, sampler=range(2), num_workers=1, multiprocessing_context="spawn")
    assert same(list(loader), [streams[0], streams[1]])


class Failing(Streams):
    """Raises, or dies, at batch 3."""

    dies = False

    def __getitem__(self, index):
        if index == 3:
            if self.dies:
                signal.raise_signal(signal.SIGKILL)
            raise UsageError("the third batch")
        return super().__getitem__(index)


@pytest.mark.parametrize("dies, error", [(False, UsageError), (True, RuntimeError)])
def test_failing_worker(corpus, dies, error):
    dataset = Failing(corpus, corpus.split()[0], Data(batch=2, seq_len=7), 5)
    dataset.dies = dies
    with pytest.raises(error, match="DataLoader worker" if dies else "the third batch"):
        list(load(dataset, 0, 9, 1, 1, False))


class Interrupted(Streams):
    """Its worker gets Ctrl-C, SIGHUP and SIGTERM before every batch."""

    def __getitem__(self, index):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        return super().__getitem__(index)


class Stuck(Streams):
    """Its worker never comes back from batch 3."""

    def __getitem__(self, index):
        if index == 3:
            time.sleep(10_000)
        return super().__getitem__(index)


EXITS = """
import itertools, sys
from pathlib import Path
from test_batches import Data, Failing, Stuck, corpus_of, load, numbered
corpus = corpus_of(Path(sys.argv[1]), numbered([30 + k for k in range(50)]))
kind = {"Failing": Failing, "Stuck": Stuck}[sys.argv[2]]
batches = load(kind(corpus, corpus.split()[0], Data(batch=2, seq_len=7), 5), 0, 9, 1, 1, False)
try:
    print(len(list(itertools.islice(batches, 3))), flush=True)
    if kind is Failing:
        next(batches)
except Exception as error:
    kept = error  # and with it the iterator, in its traceback
batches.close()
"""


@pytest.mark.parametrize("kind", ["Failing", "Stuck"])
def test_a_process_with_such_a_worker_exits(kind, tmp_path):
    """Python asks workers to end, and waits for them."""
    path = python_path(TESTS / "training", TESTS / "helpers")
    command = [sys.executable, "-c", EXITS, str(tmp_path), kind]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, b"3\n"), done.stderr


def test_workers_leave_signals_to_their_parent(corpus):
    dataset = Interrupted(corpus, corpus.split()[0], Data(batch=2, seq_len=7), 5)
    assert len(list(load(dataset, 0, 4, 1, 2, False))) == 4


@pytest.mark.parametrize(
    "kind, options, accumulate, message",
    [
        (
            Streams,
            dict(batch=40, seq_len=7),
            10,
            r"a step of --batch 40 with --accumulate 10 with --seq-len 7 needs 2,801",
        ),
        (Streams, dict(batch=2, seq_len=5000), 1, r"a step of --batch 2 with --seq-len 5000 needs 10,001"),
        (Windows, dict(batch=2, seq_len=5000), 1, r"--seq-len 5000 needs 5,001"),
    ],
)
def test_too_little_text(corpus, kind, options, accumulate, message):
    documents = corpus.split()[0]
    with pytest.raises(UsageError, match=rf"^{documents.tokens:,} tokens are too few: .*{message}. Give more"):
        kind(corpus, documents, Data(**options), 0, accumulate)


@pytest.mark.parametrize("kind, rows", [(Streams, 3), (Windows, 100)])
def test_just_enough_text(corpus, kind, rows):
    documents = corpus.split()[0]
    T = (documents.tokens - 1) // (rows if kind is Streams else 1)
    batch = kind(corpus, documents, Data(batch=rows, seq_len=T), 0)[0]
    assert batch.inputs.shape == (T, rows)
    with pytest.raises(UsageError):
        kind(corpus, documents, Data(batch=rows, seq_len=T + 1), 0)


def test_random_numbers():
    """Those of the Mersenne Twister, whose first values with key 5489 are in its authors' paper; all keys matter."""
    assert np.random.RandomState(5489).randint(1 << 32, size=2, dtype=np.uint32).tolist() == [3499211612, 581869302]
    keys = [(0, 0), (1, 1), (0, 1), (1, 0), ((1 << 32) - 1, 0)]
    assert len({tuple(random_numbers(*key).permutation(9)) for key in keys}) == 5
    assert random_numbers(7, 8).permutation(5).tolist() == random_numbers(7, 8).permutation(5).tolist()
