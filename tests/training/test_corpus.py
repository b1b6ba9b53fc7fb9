"""Text as tokens: documents, the cache, what is held out, and bad input."""

import errno
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydantic", reason="the configuration needs pydantic")
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import corpus_of, documents_of, save_tokenizer, write

from triton_lstm.settings import UsageError
from triton_lstm.training.config import Data
from triton_lstm.training.text import sources, token_file
from triton_lstm.training.text.corpus import open_corpus
from triton_lstm.training.text.sources import find_sources, pieces
from triton_lstm.training.text.vocabulary import Vocabulary, read_vocabulary

TEXTS = [b"the quick brown fox", b"jumps over\nthe lazy dog", "naïve \u20ac \U0001f600".encode()]
SEPARATORS = [None, "\n", "ab", "aab", "\u20ac"]
CONTENT = st.lists(st.sampled_from(["a", "b", "ab", "\n", " ", "\u20ac", "\U0001f600", "x" * 9]), max_size=30).map(
    lambda parts: "".join(parts).encode()
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


def split_up(contents: list[bytes], separator: str | None) -> list[bytes]:
    """The documents, by the definition."""
    parts = [content.split(separator.encode()) if separator else [content] for content in contents]
    return [document for documents in parts for document in documents if document]


@settings(max_examples=120)
@given(st.lists(CONTENT, min_size=1, max_size=4), st.sampled_from(SEPARATORS), st.integers(4, 12), st.booleans())
def test_documents(tokenizer, contents, separator, chunk, tokenized):
    """Whatever the chunks are: the documents, their bytes and the layout; tokenized documents decode to their text."""
    expected = split_up(contents, separator)
    options = dict(separator=separator, tokenizer=tokenizer if tokenized else None)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK", chunk)
        patch.setattr(token_file, "TOGETHER", 5)
        if not expected:
            with pytest.raises(UsageError, match=r"no (text|token)"):
                corpus_of(Path(name), contents, **options)
            return
        corpus = corpus_of(Path(name), contents, **options)
        found = [corpus.vocabulary.decode(ids).encode() for ids in documents_of(corpus)]
        if len(expected[0].decode()) == 1 and corpus.about["cut"]:
            return  # a character that is cut, as there is nothing else to hold out
        if not tokenized:
            assert [bytes(ids) for ids in documents_of(corpus)] == found
        if corpus.about["cut"]:
            assert len(expected) == 1 and len(found) == 2
            assert b"".join(found) == expected[0] and corpus.sizes.tolist() == [len(part) for part in found]
        else:
            assert found == expected and corpus.sizes.tolist() == [len(part) for part in expected]
        assert corpus.tokens.dtype == np.uint16 and int(corpus.tokens.max()) == corpus.end


@given(CONTENT, st.sampled_from(SEPARATORS), st.integers(4, 12))
def test_pieces(content, separator, chunk):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK", chunk)
        (Path(name) / "text").write_bytes(content + b"a")
        (source,) = find_sources([f"{name}/text"])
        read = []
        documents = [[]]
        for piece, ends in pieces(source, separator and separator.encode(), read.append):
            piece.decode()  # no character is cut
            assert len(piece) <= 2 * chunk + 9
            documents[-1].append(piece)
            documents += [[]] if ends else []
        assert sum(read) == source.size and not documents.pop()
        whole = content + b"a"
        assert [b"".join(parts) for parts in documents] == (whole.split(separator.encode()) if separator else [whole])


def test_long_documents_are_cut_between_words(tmp_path, monkeypatch, tokenizer):
    """Where a tokenizer's words begin: the tokens are those of the whole text."""
    monkeypatch.setattr(sources, "CHUNK", 32)
    text = b"the quick brown fox jumps over the lazy dog\n" * 20
    corpus = corpus_of(tmp_path, [text, b"two"], tokenizer=tokenizer)
    assert documents_of(corpus)[0] == corpus.vocabulary.encode(text).tolist()


def test_invalid_utf8(tmp_path, monkeypatch, tokenizer):
    """A tokenizer sees U+FFFD; as bytes, nothing changes."""
    monkeypatch.setattr(sources, "CHUNK", 8)
    text = bytes(range(128, 256))
    corpus = corpus_of(tmp_path, [text, b"two"], tokenizer=tokenizer)
    assert set(corpus.vocabulary.decode(documents_of(corpus)[0])) == {"\ufffd"} and corpus.sizes[0] == 128
    plain = open_corpus(Data(text=(str(tmp_path / "text"),), cache=str(tmp_path / "cache")))
    assert bytes(documents_of(plain)[0]) == text


def test_vocabulary(tokenizer):
    plain, tokenized = Vocabulary(), read_vocabulary(tokenizer)
    assert (plain.size, plain.end, plain.tokenizer) == (257, 256, None)
    assert tokenized.size == tokenized.end + 1 and tokenized.tokenizer == Path(tokenizer).read_bytes()
    for vocabulary in (plain, pickle.loads(pickle.dumps(tokenized)), plain):
        ids = vocabulary.encode("the d\u20acg")
        assert ids.dtype == np.uint16 and vocabulary.decode([vocabulary.end, *ids, 99999, -1]) == "\nthe d\u20acg\n\n"
        assert vocabulary.encode("\ud800").tolist() == vocabulary.encode("?").tolist()
    assert plain.decode([0xE2, 0x82]) == "\ufffd" and plain.decode([]) == ""
    assert len(tokenized.encode("the lazy dog")) < 9  # merges, neither padded nor truncated nor in a template
    assert len(tokenized.encode("abcdefghijk")) > 5


def test_large_vocabulary_with_gaps(tmp_path):
    from tokenizers import Tokenizer, models

    content = Tokenizer(models.WordLevel({"a": 3, "b": 70_000}, unk_token="a")).to_str()
    (tmp_path / "words.json").write_text(content)
    corpus = corpus_of(tmp_path, [b"a", b"b"], tokenizer=str(tmp_path / "words.json"))
    assert corpus.end == 70_001 and corpus.tokens.dtype == np.uint32
    assert documents_of(corpus) == [[3], [70_000]]


def test_standard_library(tmp_path):
    corpus = open_corpus(Data(cache=str(tmp_path)))
    held_out = corpus.split()[1]
    assert len(corpus.sizes) > 50 and 0.05 <= held_out.tokens / len(corpus.tokens) < 0.1
    assert open_corpus(Data(cache=str(tmp_path))).digest == corpus.digest


def test_folders(tmp_path):
    folder = write(tmp_path / "text", [b"0", b"1"])
    for name in ("b/c", "b/.hidden", ".d/e", "a.txt/f", "empty"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"" if name == "empty" else name.encode())
    (folder / "loop").symlink_to(folder)
    (folder / "nowhere").symlink_to(folder / "missing")
    (folder / "self").symlink_to(folder / "self")
    os.mkfifo(folder / "fifo")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "g").write_bytes(b"g")
    (folder / "z").symlink_to(tmp_path / "outside")
    found = [os.path.relpath(source.path, folder) for source in find_sources([str(folder)])]
    assert found == ["000.txt", "001.txt", "a.txt/f", "b/c", "z/g"]
    named = find_sources([str(folder / "b" / ".hidden"), str(folder), str(folder / "z" / "g"), str(folder / "000.txt")])
    assert len(named) == 6 and named[0].path.endswith(".hidden")


def test_split(tmp_path):
    corpus = corpus_of(tmp_path, [b"x" * (1 + k % 7) for k in range(200)], held_out=0.1)
    training, held_out = corpus.split()
    ranges = sorted(zip([*training.starts, *held_out.starts], [*training.stops, *held_out.stops], strict=True))
    assert ranges == list(zip(corpus.offsets, corpus.offsets[1:], strict=False))
    assert training.tokens + held_out.tokens == len(corpus.tokens)
    assert 0.1 <= held_out.tokens / len(corpus.tokens) < 0.13
    assert training.source_bytes == training.tokens - len(training.starts)
    assert held_out.source_bytes == held_out.tokens - len(held_out.starts)
    assert held_out.starts.tolist() == pickle.loads(pickle.dumps(corpus)).split()[1].starts.tolist()
    spread = np.diff(held_out.starts)
    assert len(set(spread.tolist())) > 3  # neither the end nor every n-th


@pytest.mark.parametrize(
    "sizes, share, held_out",
    [
        ([100, 9, 100], 0.05, [9]),  # all are larger than the share: the smallest
        ([100, 100], 0.05, [100]),
        ([1000, 3, 3, 3], 0.05, [3, 3, 3]),  # never the one that is nearly all
        ([5, 5, 5], 0.99, [5, 5]),  # one is left to train on
    ],
)
def test_split_of_few_documents(tmp_path, sizes, share, held_out):
    training, found = corpus_of(tmp_path, [b"x" * size for size in sizes], held_out=share).split()
    assert (found.stops - found.starts - 1).tolist() == held_out and training.tokens > 1


@pytest.mark.parametrize("tokenized", [False, True])
def test_one_document_is_cut(tmp_path, tokenizer, tokenized):
    """Near the share, at the end of a line, with exact bytes; another share is another cut."""
    line = "the quick br\u20acwn fox\n".encode()
    options = dict(tokenizer=tokenizer) if tokenized else {}
    corpus = corpus_of(tmp_path, [line * 100], held_out=0.1, **options)
    training, held_out = corpus.split()
    assert held_out.stops.tolist() == [len(corpus.tokens)] and training.starts.tolist() == [0]
    text = corpus.vocabulary.decode(corpus.tokens[held_out.starts[0] : held_out.stops[0]])[1:]
    assert text.encode() == (b"\n" + line * 100)[-len(text.encode()) :] and text.startswith("\nthe")
    assert held_out.source_bytes == len(text.encode()) and held_out.source_bytes + training.source_bytes == 100 * len(
        line
    )
    assert 0.1 <= held_out.source_bytes / (100 * len(line)) < 0.13
    other = open_corpus(Data(text=(str(tmp_path / "text"),), cache=str(tmp_path / "cache"), held_out=0.5, **options))
    assert 0.5 <= other.split()[1].source_bytes / (100 * len(line)) < 0.53 and other.digest != corpus.digest


def test_digest(tmp_path, tokenizer):
    """Says what the documents are, not where or when."""

    def digest(name, contents, **options):
        (tmp_path / name).mkdir()
        return corpus_of(tmp_path / name, contents, **options).digest

    known = digest("a", [b"one", b"two"])
    assert digest("b", [b"one", b"two"]) == known == digest("c", [b"one\n", b"\ntwo"], separator="\n")
    others = [
        digest("d", [b"onet", b"wo"]),
        digest("e", [b"two", b"one"]),
        digest("f", [b"one", b"two"], tokenizer=tokenizer),
    ]
    assert len({known, *others}) == 4


@pytest.mark.parametrize("change", ["longer", "shorter", "touched", "replaced"])
def test_text_that_changes(tmp_path, change, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 8)
    path = write(tmp_path / "text", [b"0123456789" * 3]) / "000.txt"
    (source,) = find_sources([str(path)])
    reading = pieces(source, None, lambda count: None)
    if change != "replaced":
        next(reading)
    contents = {"longer": b"x" * 31, "shorter": b"x" * 5, "touched": b"0123456789" * 3, "replaced": b"9876543210" * 3}
    path.write_bytes(contents[change])
    os.utime(path, ns=(1, 1))
    with pytest.raises(UsageError, match="changed while it was read"):
        list(reading)


def bad(tmp_path: Path, name: str) -> dict:
    (tmp_path / "file").write_bytes(b"text of a file\n")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".hidden").write_bytes(b"x")
    (tmp_path / "json").write_text("{}")
    os.mkfifo(tmp_path / "fifo")
    return {
        key: value if "\0" in value else str(tmp_path / value)
        for key, value in ({"text": "file"} | dict([name.split("=", 1)])).items()
    }


@pytest.mark.parametrize(
    "what, message",
    [
        ("text=missing", "cannot read the text .*missing: No such file"),
        ("text=file/below", "cannot read the text .*: Not a directory"),
        ("text=a\0b", "cannot read the text a.b: .*null"),
        ("text=fifo", "neither a regular file nor a folder"),
        ("text=empty", "there is no text in .*empty"),
        ("text=folder", "has no files, besides hidden ones"),
        ("tokenizer=missing", "cannot read the tokenizer .*missing: No such file"),
        ("tokenizer=folder", "not a regular file"),
        ("tokenizer=fifo", "not a regular file"),
        ("tokenizer=json", "json is not a file of the tokenizers package"),
        ("tokenizer=file", "file is not a file of the tokenizers package"),
        ("tokenizer=empty", "empty is not a file of the tokenizers package"),
        ("tokenizer=a\0b", "cannot read the tokenizer a.b: .*null"),
        ("cache=file", "cannot write token files in the folder .*file: (File exists|Not a directory)"),
        ("cache=file/below", "cannot write token files in the folder .*: Not a directory"),
        ("cache=a\0b", "cannot write token files .*null"),
        ("cache=~nobody-has-this-name/x\0", "begins with the home folder of nobody"),
    ],
)
def test_bad_input(tmp_path, what, message):
    options = bad(tmp_path, what)
    with pytest.raises(UsageError, match=message) as caught:
        open_corpus(Data(**({"cache": str(tmp_path / "cache")} | options | {"text": (options["text"],)})))
    assert "\n" not in str(caught.value) and "ive " in str(caught.value)


def test_tokenizer_that_cannot_encode(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="b")).save(str(tmp_path / "words.json"))
    with pytest.raises(UsageError, match=r"the tokenizer cannot encode the text: .*Give"):
        corpus_of(tmp_path, TEXTS, tokenizer=str(tmp_path / "words.json"))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_too_short_to_hold_out(tmp_path):
    with pytest.raises(UsageError, match=r"one document of 1 tokens, too short .*--text, or a --separator"):
        corpus_of(tmp_path, [b"x"]).split()


def test_unreadable_folder(tmp_path, monkeypatch):
    folder = write(tmp_path / "text", TEXTS)
    known = os.scandir

    def scandir(path):
        if str(path).endswith("secret"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return known(path)

    (folder / "secret").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UsageError, match=r"cannot read the text .*secret: Permission denied"):
        find_sources([str(folder)])


def test_no_home_folder(monkeypatch):
    platformdirs = pytest.importorskip("platformdirs")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *args: "~/.cache/triton_lstm")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UsageError, match=r"there is no home folder. Give one by --cache"):
        open_corpus(Data())


def test_pickles_by_path(tmp_path):
    corpus = corpus_of(tmp_path, [b"x" * 100_000, b"y" * 100_000])
    content = pickle.dumps(corpus)
    assert len(content) < 1000 and documents_of(pickle.loads(content)) == documents_of(corpus)
