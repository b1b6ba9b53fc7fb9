"""Terminal output: every table at every width, escaped control characters, progress."""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

pytest.importorskip("pandas")
import pandas as pd
import torch
from child import python_path
from frames import make

from triton_lstm.perf.cases import Case
from triton_lstm.perf.results import write
from triton_lstm.system import terminal
from triton_lstm.system.terminal import Bar, escaped, print_table, say, sentence

WIDTHS = (60, 80, 120, 200)
LONG = Case("bf16", T=1024, B=128, H=1024, bidirectional=True, why="the longest name")
CASES = [LONG, Case("fp16", T=1024, B=16, H=64), Case("fp16", T=128, B=16, H=64)]
# Commands in this process's terminal, at every width; what takes long is made up
DRIVER = """
import fcntl, json, struct, sys, termios
import torch, triton_lstm
from triton_lstm.cli import doctor, main as cli
from triton_lstm.perf import floor

floor.floor_names = lambda device: ["copy"]
doctor.findings = lambda: [
    doctor.Finding("triton_lstm", "ok", "0.1.0, Python 3.11"),
    doctor.Finding("environment", "BAD", "a text of many words " * 9, "a remedy of many words " * 9),
]
commands, widths = json.loads(sys.argv[1])
for name, argv in commands.items():
    for width in widths:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        print(f"@@@ {name} {width}", flush=True)
        if name == "explain":
            module = triton_lstm.LSTM(512, 768, 2, bidirectional=True, dtype=torch.bfloat16)
            triton_lstm.explain(module, torch.zeros(10, 64, 512, dtype=torch.bfloat16), gpu="H200")
        else:
            cli.main(argv)
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The lines of every command at every width, by (name, width), as received by a terminal."""
    pty = pytest.importorskip("pty")
    folder = tmp_path_factory.mktemp("shown")
    before, after = make([2.0, 0.5, 1.0], CASES), make([2.0, 0.3, 1.0], CASES)
    bad = (after["provider"] == "triton_lstm") & (after["case"] == CASES[2].name) & (after["mode"] == "inference")
    after.loc[bad, ["status", "reason"]] = ["failed", "RuntimeError: an illegal memory access was encountered there"]
    for name, frame in (("before", before), ("after", after)):
        (folder / name).mkdir()
        write(frame, folder / name / "bench_quick.csv")
    smoke = "bench --suite smoke --only provider=triton_lstm,nn.LSTM --only mode=inference"
    smoke += f" --only case=fp32-T3-B2-I8-H8,fp32-T4-B3-I8-H8-packed --out {folder / 'smoke'}"
    commands = {
        "bench": smoke.split(),
        "report": ["report", str(folder / "after"), "--only", "date=2026-01-02T03:04:05+00:00"],
        "diff": ["diff", str(folder / "before"), str(folder / "after")],
        "tune": ["tune", "--dry-run", "--gpu", "H200", "--hidden", "64,768", "--batch", "16", "--dtype", "bf16,fp32"],
        "doctor": ["doctor"],
        "explain": [],
    }
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment |= {"PYTHONPATH": python_path(), "TERM": "xterm"}
    leader, follower = pty.openpty()
    arguments = [sys.executable, "-c", DRIVER, json.dumps([commands, WIDTHS])]
    errors = (folder / "errors").open("w+")
    process = subprocess.Popen(arguments, stdout=follower, stderr=errors, env=environment, cwd=folder)
    os.close(follower)
    data = b""
    while True:
        try:
            part = os.read(leader, 1 << 16)
        except OSError:  # Linux's end of file of a terminal
            break
        if not part:
            break
        data += part
    os.close(leader)
    errors.seek(0)
    assert process.wait() == 0, errors.read()[-2000:]
    text = re.sub(r"\x1b\[[0-9;]*m", "", data.decode().replace("\r\n", "\n"))
    parts = re.split(r"^@@@ (\w+) (\d+)\n", text, flags=re.MULTILINE)[1:]
    return {(parts[k], int(parts[k + 1])): parts[k + 2].splitlines() for k in range(0, len(parts), 3)}


COMMANDS = ("bench", "report", "diff", "tune", "doctor", "explain")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_cut_off(command, width, shown):
    lines = shown[command, width]
    assert len(lines) > 2 and "Traceback" not in str(lines) and "…" not in str(lines)
    for line in lines:  # a word that is too long, a path say, stays in one piece
        assert len(line.rstrip()) <= width or len(line.split()) == 1, line


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", ["tune", "doctor", "explain"])
def test_the_same_text_at_every_width(command, width, shown):
    def words(width):
        return Counter(word for line in shown[command, width] for word in line.split() if set(word) != {"─"})

    assert words(width) == words(200)


def rows(lines):
    return [" ".join(line.split()) for line in lines]


@pytest.mark.parametrize("width", WIDTHS)
def test_report_keeps_verdicts_and_modes(width, shown):
    text = "\n".join(rows(shown["report", width]))
    for case, verdict in zip(CASES, ("wins", "LOSES", "even"), strict=True):
        assert f"{case.name} forward_backward {verdict}" in text
    assert f"{LONG.name} inference wins" in text and "failed:" in text
    assert f"no room in {width} columns for:" in text if width < 120 else f"{LONG.name} inference wins 2 " in text


@pytest.mark.parametrize("width", WIDTHS)
def test_diff_keeps_the_verdict(width, shown):
    text = "\n".join(rows(shown["diff", width]))
    assert f"{LONG.name} inference same" in text and f"{CASES[1].name} forward_backward SLOWER" in text
    assert f"{CASES[2].name} inference LOST" in text and "failed:" in text.partition("LOST, and why")[2]
    assert "no room" in text if width < 120 else f"{CASES[1].name} inference SLOWER 1.667" in text


@pytest.mark.parametrize("width", WIDTHS)
def test_bench_keeps_its_summary(width, shown):
    text = "\n".join(rows(shown["bench", width]))
    verdict = "" if torch.cuda.is_available() else " not a benchmark"
    for case in ("fp32-T3-B2-I8-H8", "fp32-T4-B3-I8-H8-packed"):
        assert f"{case} inference{verdict}" in text
    assert "4 rows to measure" in text and (not verdict or "NOT A BENCHMARK" in " ".join(text.split()))


FRAME = pd.DataFrame({"case": ["a-long-name-of-a-case"], "share": [0.5], "us_per_step": [1234.5], "empty": [""]})


@pytest.mark.parametrize("columns", [None, "", "0", "-3", "many", "²", "1", "30", "80", "9" * 30])
def test_piped_output_honours_columns(columns, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", "²")
    monkeypatch.setattr(terminal.sys, "__stdout__", None)  # no terminal, however this test is run
    print_table(FRAME, keep=["case"])
    out = capsys.readouterr().out
    if columns in ("1", "30"):
        width = max(int(columns), terminal.NARROWEST)
        assert max(map(len, out.splitlines())) <= width
        assert f"no room in {width} columns for:" in out.replace("\n", " ") and "us per step" in out.replace("\n", " ")
    else:
        header, _, row = out.splitlines()
        assert header.split() == ["case", "share", "us", "per", "step"]
        assert row.split() == ["a-long-name-of-a-case", "0.5", "1,234"]


def test_cells_are_neither_markup_nor_control_sequences(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    odd = "[red]x[/y] :smile: \x1b[31m\x9b2J\x07 \u202eabc a\nb"
    print_table(pd.DataFrame({odd: [odd], "b": [1]}), title=odd)
    say(odd)
    out = capsys.readouterr().out
    assert out.count(r"[red]x[/y] :smile: \x1b[31m\x9b2J\x07 \u202eabc a") == 4
    assert all(c.isprintable() or c == "\n" for c in out)


def test_columns_named_twice(capsys):
    print_table(pd.concat([FRAME, FRAME], axis=1)[["share", "share"]].iloc[:, :2])
    assert capsys.readouterr().out.split().count("0.5") == 2


def test_sentences_and_escapes():
    assert sentence("no") == sentence("no.") == sentence("no. ") == sentence("no ...") == "no."
    assert sentence("Is it?") == "Is it?"
    assert escaped("a\x1b\n\u00e9\udc80") == "a\\x1b\\n\u00e9\\udc80"


def test_progress_in_a_pipe_is_a_line_at_intervals(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with Bar(total=500, unit="step") as bar:
        for k in range(500):
            now[0] += 0.2
            bar.set_description(f"case {k}")
            bar.set_postfix_str(f"loss {k}")
            bar.update()
    lines = capsys.readouterr().err.split("\n")
    assert lines[-1] == "" and "\r" not in str(lines) and 8 <= len(lines) - 1 <= 12
    assert "500/500" in lines[-2] and "loss 499" in lines[-2]


def test_progress_in_a_terminal_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Bar(total=2) as bar:
        bar.update()
        bar.refresh()
    assert capsys.readouterr().err.count("\r") >= 2
