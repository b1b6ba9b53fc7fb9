"""Small texts, a tiny tokenizer, and corpora of them."""

from collections.abc import Sequence
from pathlib import Path

from triton_lstm.training.config import Data
from triton_lstm.training.text.corpus import Corpus, open_corpus


def write(folder: Path, contents: Sequence[bytes]) -> Path:
    """A folder with a file of each content, in this order."""
    folder.mkdir()
    for number, content in enumerate(contents):
        (folder / f"{number:03}.txt").write_bytes(content)
    return folder


def corpus_of(folder: Path, contents: Sequence[bytes], **options) -> Corpus:
    """The corpus of new files with these contents."""
    return open_corpus(Data(text=(str(write(folder / "text", contents)),), cache=str(folder / "cache"), **options))


def documents_of(corpus: Corpus) -> list[list[int]]:
    """The ids of every document, without `end`, which begins each."""
    found = [corpus.tokens[a:b].tolist() for a, b in zip(corpus.offsets, corpus.offsets[1:], strict=False)]
    assert all(ids[0] == corpus.end and corpus.end not in ids[1:] for ids in found)
    return [ids[1:] for ids in found]


def save_tokenizer(path: Path) -> Path:
    """A byte-level BPE tokenizer with some merges, truncation, padding and a template, which are not to be used."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, the end"] * 9, trainer)
    tokenizer.add_special_tokens(["[S]"])
    number = tokenizer.token_to_id("[S]")
    tokenizer.post_processor = processors.TemplateProcessing(single="[S] $A [S]", special_tokens=[("[S]", number)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(path))
    return path
