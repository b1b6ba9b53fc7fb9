"""The command train: what it prints, what it refuses, and its comparison with nn.LSTM."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pydantic", reason="the configuration needs pydantic")
pytest.importorskip("cyclopts", reason="the options of `train` need cyclopts")
import torch
from training import DEVICE, losses, rows, runs

import triton_lstm
from triton_lstm.cli import train as commands
from triton_lstm.training.compare import ResettingLSTM, compare


def test_learns_and_reports(run, tmp_path):
    status, out, err = run("--steps", 60, "--lr", 0.05, "--warmup", 5)
    assert status == 0
    assert "tokens/s" in err and "loss" in err  # the progress bar
    assert "bits per byte" in out and "sample: " in out
    curve = losses(runs(tmp_path)[0])
    assert len(curve) == 60 and curve[-1] < curve[0] - 1


COMPARED = {
    "float32": ["--dtype", "float32"],
    "bfloat16": ["--dtype", "bfloat16"],
    "float16": ["--dtype", "float16"],
    "float64": ["--dtype", "float64"],
    "windows": ["--batches", "windows"],
    "no resets": ["--no-reset"],
    "dropout": ["--no-reset", "--dropout", 0.3],
    "dropout in windows": ["--batches", "windows", "--no-reset", "--dropout", 0.3, "--dtype", "bf16"],
    "accumulation": ["--accumulate", 2, "--dtype", "fp16"],
    "memory": ["--recompute", "--clip", "off", "--schedule", "constant", "--weight-decay", 0.5],
    "deterministic": ["--deterministic", "--workers", 1],
    "compiled": ["--compile", "--dtype", "bf16"],
}


@pytest.mark.parametrize("options", COMPARED.values(), ids=COMPARED)
def test_compare_agrees(run, options, device):
    if DEVICE == "cuda" and "--dropout" in options:
        pytest.skip("cuDNN draws other random numbers: refused")
    status, out, err = run("--steps", 5, "--compare", *options)
    assert status == 0, err
    assert "agree at all 5 steps" in out and "nn.LSTM" in out and "triton_lstm" in out
    assert ("Triton kernels" in out) == ("float64" not in options or DEVICE == "cpu")


def test_compare_detects_a_wrong_lstm(run, monkeypatch):
    """The comparison can fail: an LSTM whose output is 1% too large is detected."""

    class Wrong(triton_lstm.LSTM):
        def forward(self, input, hx=None, **options):
            output, states = super().forward(input, hx, **options)
            return output * 1.01, states

    monkeypatch.setattr(commands, "LSTM", Wrong)
    status, out, _ = run("--steps", 5, "--compare", "--hidden", 32, "--warmup", 1, "--lr", 0.03)
    assert status == 1 and "diverge at step" in out


def test_compare_bound():
    checked = compare([1.0, 2.0], [1.0, 2.0002], [1.0, 2.0002])
    assert [row["ok"] for row in checked] == [True, True]
    checked = compare([1.0, 2.0], [1.0, 2.0003], [1.0, 2.0003])
    assert [row["ok"] for row in checked] == [True, False]
    # the running maximum of the first step counts
    checked = compare([1.0, 2.0], [1.001, 2.001], [1.0, 2.001])
    assert [row["ok"] for row in checked] == [True, True]


def test_what_is_compared_with_is_one_call_per_segment():
    """ResettingLSTM against nn.LSTM on every segment of every row alone."""
    theirs = ResettingLSTM(3, 4, 2, compute=torch.float64).double()
    plain = torch.nn.LSTM(3, 4, 2).double()
    plain.load_state_dict(theirs.state_dict())
    x, h, c = torch.randn(7, 2, 3).double(), torch.randn(2, 2, 4).double(), torch.randn(2, 2, 4).double()
    resets = torch.zeros(7, 2, dtype=torch.bool)
    resets[0, 1] = resets[3, 0] = resets[4, 0] = True
    y, (h_n, c_n) = theirs(x, (h, c), resets)
    for row, begins in ((0, [0, 3, 4, 7]), (1, [0, 7])):
        state = (h[:, [row]], c[:, [row]]) if row == 0 else None
        for begin, end in itertools.pairwise(begins):
            expected, states = plain(x[begin:end, [row]], state)
            torch.testing.assert_close(y[begin:end, [row]], expected)
            state = None
        torch.testing.assert_close((h_n[:, [row]], c_n[:, [row]]), states)


BAD_INPUT = {
    "missing text": (["--text", "nowhere.txt"], "nowhere.txt: No such file"),
    "empty text": (["--text", "empty.txt"], "--text"),
    "short text": (["--text", "short.txt"], "--text"),
    "steps": (["--steps", "0"], "--steps: input should be greater than or equal to 1, got '0'"),
    "no number": (["--steps", "many"], "--steps: input should be a valid integer"),
    "a number of many digits": (["--batch", "9" * 5000], "--batch: "),
    "layers without end": (["--layers", "1000000000"], "--layers: input should be less than or equal to 1000"),
    "learning rate": (["--lr", "-1"], "--lr: input should be greater than 0, got '-1'"),
    "a learning rate beyond float32": (["--lr", "1e39"], "--lr: input should be less than or equal to"),
    "a sequence longer than the text": (["--seq-len", "300000"], "--seq-len"),
    "nan": (["--lr", "nan"], "--lr: input should be"),
    "seed": (["--seed", "-3"], "--seed: input should be greater than or equal to 0"),
    "dtype": (["--dtype", "int8"], "--dtype: input should be 'fp16', 'bf16', 'tf32', 'fp32' or 'fp64', got 'int8'"),
    "unknown flag": (["--hiden", "3"], "Unknown option: --hiden. Did you mean --hidden?"),
    "a word": (["fast"], "unexpected: fast. Options begin with two dashes. See"),
    "no value": (["--hidden"], "--hidden requires an argument"),
    "one value of two": (["--betas", "0.5"], "--betas"),
    "resume nothing": (["--resume", "--folder", "nowhere"], "nowhere has no checkpoint of `train`"),
    "resume where nothing was trained": (["--resume"], "runs does not exist. Train first"),
    "resume an empty folder": (["--resume", "--folder", "empty"], "empty has no checkpoint"),
    "resume a text": (["--resume", "--folder", "short.txt"], "short.txt has no checkpoint"),
    "a folder that is no run": (["--folder", "empty"], "empty exists. It is no run: choose another --folder"),
    "unwritable": (["--folder", "short.txt/x"], "cannot write to short.txt/x"),
    "graphs without a GPU": (["--cuda-graphs", "--device", "cpu"], "--cuda-graphs needs a GPU"),
    "gradients for nobody": (["--gradients-every", "3"], "Add --tensorboard or --wandb"),
    "dropout and resets to compare": (["--compare", "--dropout", "0.1", "--device", "cpu"], "Add --no-reset, or omit"),
    "dropout and compilation to compare": (["--compare", "--dropout", "0.1", "--compile"], "Omit one"),
    "missing tokenizer": (["--tokenizer", "nowhere.json"], "nowhere.json"),
    "malformed tokenizer": (["--tokenizer", "short.txt"], "short.txt is not a file of the tokenizers package"),
    "missing config": (["--config", "nowhere.yaml"], "cannot read --config nowhere.yaml: No such file"),
    "a folder as config": (["--config", "empty"], "must end in .yaml, .yml or .toml"),
    "malformed config": (["--config", "bad.yaml"], "--config bad.yaml: while parsing a flow sequence"),
    "malformed TOML": (["--config", "bad.toml"], "--config bad.toml: Unclosed array"),
    "no text": (["--text", ""], "--text.0: string should have at least 1 character"),
    "no text at all": (["--text"], "--text requires at least 1 element"),
    "a section": (["--config", "section.yaml"], "section.yaml: model must be a value, or a list of values"),
    "a null in a list": (["--config", "null.yaml"], "null.yaml: text must be a value, or a list of values"),
    "a list in itself": (["--config", "cycle.yaml"], "cycle.yaml: text must be a value, or a list of values"),
    "a key that is a number": (["--config", "number.yaml"], "number.yaml: a key must be the name of an option, got 5"),
    "a tag": (["--config", "tag.yaml"], "--config tag.yaml: "),
    "a key twice": (["--config", "twice.yaml"], "twice.yaml: seq-len is given twice"),
    "resume in a config": (["--config", "own.yaml"], "own.yaml: resume is for the command line only"),
    "no config": (["--config", ""], "must end in .yaml, .yml or .toml"),
    "dropout of one layer": (["--dropout", "0.1", "--layers", "1"], "with --layers 1 it has no effect"),
    "a config that is a list": (["--config", "list.yaml"], "list.yaml: it must have options and their values"),
    "unknown key": (["--config", "unknown.yaml"], "unknown.yaml. Did you mean --weight-decay?"),
    "a key with other letters": (["--config", "far.toml"], "far.toml. Did you mean --betas?"),
    "a bad value in a config": (["--config", "value.yaml"], "--dropout: input should be a valid number"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line(case, run, tmp_path):
    files = {
        "empty.txt": "",
        "short.txt": "0123456789",
        "bad.yaml": "hidden: [1",
        "bad.toml": "hidden = [1",
        "list.yaml": "- 3",
        "unknown.yaml": "weigth_decay: 3",
        "far.toml": "batas = 3",
        "value.yaml": "dropout: much",
        "section.yaml": "model: {hidden: 3}",
        "null.yaml": "text: [null]",
        "cycle.yaml": "text: &a [*a]",
        "number.yaml": "5: 3",
        "tag.yaml": "steps: !foo 3",
        "twice.yaml": "seq_len: 3\nseq-len: 4",
        "own.yaml": "resume: true",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "empty").mkdir()
    args, expected = BAD_INPUT[case]
    before = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
    status, out, err = run("--steps", 1, *args, text=None if "--text" in args else tmp_path / "text.txt")
    assert status == 2
    assert expected in err and len(err.strip().splitlines()) == 1, err
    assert err.startswith("triton-lstm train: ") and out == ""
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before


@pytest.mark.parametrize("content", ["clip: off", "clip: 'off'", "clip: no", "clip = false", "clip = 'off'"])
def test_clipping_is_off_in_any_spelling(content, tmp_path, monkeypatch):
    from triton_lstm.cli.train_options import parse

    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))
    path = tmp_path / ("a.toml" if "=" in content else "a.yaml")
    path.write_text(content)
    assert parse(["--config", str(path), "--device", "cpu"]).config.optimizer.clip is None
    assert parse(["--config", str(path), "--clip", "0.5", "--device", "cpu"]).config.optimizer.clip == 0.5


@pytest.mark.parametrize("hidden, reason", [(1 << 31, "overflow"), (1 << 20, "training needs "), (64, None)])
def test_a_model_without_end_is_refused(hidden, reason, run, quick, monkeypatch):
    """By its size: where the system promises more memory than there is, the process would be killed.

    hidden units: whose weights nobody can count, or hold, and who just fit.
    """
    weights = 4 * 64 * (4 + 64 + 2) + 4 * 64 * (64 + 64 + 2) + 257 * 4 + 257 * (64 + 1)
    monkeypatch.setattr("triton_lstm.training.model.memory_of", lambda _: 4 * 4 * weights)
    status, _, err = run("--steps", 1, "--hidden", hidden)
    if reason is None:
        assert status == 0, err
    else:
        assert status == 2 and "Lower --hidden, --layers or --embed" in err and reason in err
        assert len(err.strip().splitlines()) == 1


def test_a_run_that_diverges_still_reports(run, quick):
    status, out, err = run("--steps", 3, "--lr", "1e30", "--warmup", 0)
    assert status == 0 and err.count("the loss is nan. The best model") == 1
    assert "sample: none: the model's logits are not finite" in out


def test_held_out_is_in_nats_and_bits(run, text, tmp_path, quick):
    """In the unit of the loss, over all held-out text; in metrics.csv as well."""
    status, out, _ = run("--steps", 2)
    nats, bits, tokens = re.search(
        r"held out: (\S+) nats per token or (\S+) bits per byte, over all (\S+) t", out
    ).groups()
    found = rows(runs(tmp_path)[0])[-1]
    assert status == 0 and float(nats) == round(float(found["validation_loss"]), 3)
    assert float(bits) == round(float(found["bits_per_byte"]), 3)
    # Every document begins with a token that is no byte
    documents = text.read_bytes().split(b"\n")
    lengths = {len(document) + 1 for document in documents if document}
    held_out = [a * min(lengths) + b * max(lengths) for a in range(5) for b in range(5)]
    assert int(tokens) + 1 in held_out
    share = (int(tokens) + 1) / sum(len(document) + 1 for document in documents if document)
    assert 0.04 < share < 0.1


@pytest.mark.parametrize("name, value", [("TRITON_LSTM_BACKEND", "cuda"), ("TRITON_LSTM_SPIN_LIMIT", "abc")])
def test_bad_environment_is_one_line(name, value, run, device, monkeypatch):
    monkeypatch.setenv(name, value)
    status, _, err = run("--steps", 1)
    assert status == 2 and len(err.strip().splitlines()) == 1, err


def test_default_text(run, quick, tmp_path):
    """The sources of Python's standard library."""
    status, out, _ = run("--steps", 1, "--batch", 64, "--seq-len", 64, text=None)
    assert status == 0 and int(re.search(r"over all (\S+) tokens", out)[1].replace(",", "")) > 100_000


def test_no_command_and_module_entry_point():
    done = subprocess.run([sys.executable, "-m", "triton_lstm"], capture_output=True, text=True, cwd=Path("/"))
    assert done.returncode == 2 and "COMMAND" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_help_names_every_option(run):
    status, out, _ = run("--help")
    assert status == 0
    for flag in ("--config", "--resume", "--compare", "--hidden", "--seq-len", "--clip", "--wandb", "--tokenizer"):
        assert flag in out
