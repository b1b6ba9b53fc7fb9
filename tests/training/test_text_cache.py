"""The cache of token files: killed, damaged, full, wanted by two processes at once."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import pytest

pytest.importorskip("pydantic", reason="the configuration needs pydantic")
from texts import corpus_of, documents_of, save_tokenizer, write

from triton_lstm.settings import UsageError
from triton_lstm.training.config import Data
from triton_lstm.training.text import corpus as corpus_module
from triton_lstm.training.text import folder_cache, token_file
from triton_lstm.training.text.corpus import open_corpus

TEXTS = [b"the quick brown fox", b"jumps over\nthe lazy dog", b"the end"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


def test_cached(tmp_path, monkeypatch):
    """The second time nothing is encoded; a file that is touched and another separator are other keys."""
    corpus = corpus_of(tmp_path, TEXTS)
    made = []
    monkeypatch.setattr(corpus_module, "write_token_file", lambda folder, *args, **kwargs: made.append(1) or 1 / 0)
    data = dict(text=(str(tmp_path / "text"),), cache=str(tmp_path / "cache"))
    assert open_corpus(Data(**data)).folder == corpus.folder and not made
    assert open_corpus(Data(**data, held_out=0.4)).folder == corpus.folder  # several files are not cut
    for change in ("separator", "time"):
        if change == "time":
            os.utime(tmp_path / "text" / "000.txt", ns=(1, 1))
        with pytest.raises(ZeroDivisionError):
            open_corpus(Data(**data, separator="the" if change == "separator" else None))
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == ["", ".lock", ".lock", ".lock"]


def damage(folder: Path, how: str) -> None:
    name, _, what = how.partition(" ")
    path = folder / name
    if what == "missing":
        path.unlink()
    elif what == "half":
        os.truncate(path, path.stat().st_size // 2)
    elif what == "empty":
        os.truncate(path, 0)
    elif what == "more":
        path.write_bytes(path.read_bytes() + b"xx")
    elif what == "file":
        folder.rename(f"{folder}.moved")
        folder.write_bytes(b"")
    elif what == "objects":  # 8 bytes each, addresses to NumPy
        about = json.loads(path.read_text())
        (folder / token_file.TOKENS).write_bytes(b"A" * 8 * about["tokens"])
        path.write_text(json.dumps(about | {"dtype": "|O"}))
    elif what.startswith("format"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": token_file.FORMAT + 1}))
    else:
        path.write_text(what)


@pytest.mark.parametrize(
    "how",
    [
        *(
            f"{name} {what}"
            for name in ("tokens.bin", "documents.npy", "bytes.npy")
            for what in ("half", "missing", "empty")
        ),
        *(f"about.json {what}" for what in ("half", "missing", "empty", "[]", "{}", "\x00", '{"format": 1}', "format")),
        "tokens.bin more",
        "about.json objects",
        "tokenizer.json missing",
        ". file",
    ],
)
def test_damaged(tmp_path, tokenizer, how):
    corpus = corpus_of(tmp_path, TEXTS, tokenizer=tokenizer)
    digest, documents = corpus.digest, documents_of(corpus)
    damage(corpus.folder, how)
    again = open_corpus(Data(text=(str(tmp_path / "text"),), cache=str(tmp_path / "cache"), tokenizer=tokenizer))
    assert again.digest == digest and documents_of(again) == documents


CHILD = """
import os, resource, sys, time
from triton_lstm.settings import UsageError
from triton_lstm.training.text import folder_cache, token_file
from triton_lstm.training.config import Data
from triton_lstm.training.text.corpus import open_corpus
mode, text, cache = sys.argv[1:]
def stop():
    print("now", flush=True)
    time.sleep(600)
if mode == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
if mode == "while encoding":
    def batches(pieces, known=token_file._batches):
        yield from known(pieces)
        stop()
    token_file._batches = batches
if mode == "before the name":
    os.rename = lambda *names: stop()
try:
    print(open_corpus(Data(text=(text,), cache=cache)).digest)
except UsageError as error:
    print(error)
"""


def child(mode: str, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, mode, str(folder / "text"), str(folder / "cache")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("when", ["while encoding", "before the name"])
def test_killed(tmp_path, when):
    """kill -9 leaves nothing that is taken for tokens, and what it leaves is removed with the next text's."""
    write(tmp_path / "text", TEXTS)
    with child(when, tmp_path) as process:
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGKILL)
    cache = tmp_path / "cache"
    (left,) = cache.glob("*.tmp")
    assert {path.suffix for path in cache.iterdir()} == {".tmp", ".lock"}
    mine = cache / "notes.tmp"
    mine.write_text("not the cache's")
    other = corpus_module.open_corpus(Data(text=(str(tmp_path / "text" / "000.txt"),), cache=str(cache)))
    assert not left.exists() and other.folder.is_dir() and mine.exists()
    corpus = open_corpus(Data(text=(str(tmp_path / "text"),), cache=str(cache)))
    assert [bytes(ids) for ids in documents_of(corpus)] == TEXTS


def test_file_size_limit(tmp_path):
    write(tmp_path / "text", [b"x" * 5000, b"y"])
    with child("limit", tmp_path) as process:
        out = process.communicate()[0]
    assert out.startswith(f"cannot write token files in the folder {tmp_path / 'cache'}: File too large. Free space")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("call", ["os.fsync", "os.rename", "numpy.save"])
def test_full_disk(tmp_path, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(call, full)
    with pytest.raises(UsageError, match=f"in the folder {tmp_path / 'cache'}: No space left on device"):
        corpus_of(tmp_path, TEXTS)
    monkeypatch.undo()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_one_process_at_a_time(tmp_path, monkeypatch):
    """Who finds the folder locked says so, waits, and takes what is there then."""
    corpus = corpus_of(tmp_path, TEXTS)
    monkeypatch.setattr(folder_cache, "SOON_S", 0.01)
    hidden = corpus.folder.rename(tmp_path / "elsewhere")
    held, waited_for = threading.Event(), threading.Event()

    def hold():
        with filelock.FileLock(f"{corpus.folder}.lock"):
            held.set()
            waited_for.wait()
            hidden.rename(corpus.folder)

    def says(*args, **kwargs):
        waited_for.set()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    monkeypatch.setattr(folder_cache, "print", says, raising=False)
    monkeypatch.setattr(corpus_module, "write_token_file", lambda *args, **kwargs: 1 / 0)
    again = open_corpus(Data(text=(str(tmp_path / "text"),), cache=str(tmp_path / "cache")))
    thread.join()
    assert again.digest == corpus.digest and waited_for.is_set()
