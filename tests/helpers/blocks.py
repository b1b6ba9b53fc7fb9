"""What a code block of the documentation is checked by: its language decides."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import pytest
import torch
from sybil.document import Document
from sybil.example import Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from triton_lstm.cli import main as cli

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
TRAINING = ["--hidden=8", "--embed=4", "--layers=1", "--batch=4", "--seq-len=5", "--sample=5", "--dtype=fp32"]
SMALLER = {  # replaces what a command says, so that it takes seconds
    "train": [*TRAINING, "--steps=2", "--validate-every=2", "--save-every=2"],
    "train --resume": ["--steps", "3"],
    "gradients": ["--seq-len", "5"],
    "bench": ["--only", "case=fp32-T3-B2-I8-H8", "--only", "mode=inference", "--only", "provider=triton_lstm,nn.LSTM"],
}
ENVIRONMENT = re.compile(r"^([A-Z_0-9]+=\S* )+")


def document_of(page: Path, output: Callable[[], str]) -> Document:
    """The page, to be evaluated block by block; `output` returns what commands printed since it was called last.

    A block after `<!-- skip: next "why" -->` is not run.
    """

    def console(example: Example) -> None:
        scripts = re.findall(r"^```python\n# (\S+\.py)$", example.document.text, re.MULTILINE)
        for line in commands_in(example.parsed):
            check_command(line, output, scripts)

    def yaml(example: Example) -> None:
        """A configuration of train, in a file with the name that is in its first line, for commands that follow."""
        named = re.match(r"# (\S+\.yaml)\n", example.parsed)
        name = named[1] if named else "config.yaml"
        Path(name).write_text(example.parsed)
        run_command(["train", "--config", name, *SMALLER["train"]], 0, name, output)

    return Document.parse(
        str(page),
        PythonCodeBlockParser(),
        CodeBlockParser("console", console),
        CodeBlockParser("yaml", yaml),
        SkipParser(),
    )


def languages_in(page: Path) -> set[str]:
    """The languages of all fenced blocks, "" for a fence without one."""
    fences = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)
    assert len(fences) % 2 == 0 and not any(fences[1::2]), f"{page}: a fence is not closed"
    return {language.strip() for language in fences[::2]}


def commands_in(source: str) -> Iterable[str]:
    """The commands of a console block, without comments; a line that ends with a backslash goes on in the next."""
    for line in source.replace("\\\n", " ").splitlines():
        if line.split("#")[0].strip():
            yield line


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text().replace("\\\n", "")
    return set(re.findall(r"^\.PHONY:(.*)", text, re.MULTILINE)[0].split())


def check_command(line: str, output: Callable[[], str], scripts: Collection[str] = ()) -> None:
    """Runs a command of this package in this process, with small sizes; of all others checks that they exist.

    scripts: the files that the page says how to write. Raises AssertionError.
    """
    bare = re.sub(r"^torchrun .*?(?=-m |\S+\.py)", "python ", re.sub(ENVIRONMENT, "", line.strip()))
    words = shlex.split(bare, comments=True)
    name, *rest = words
    if words[:3] == ["python", "-m", "triton_lstm"] or name == "triton-lstm":
        argv = words[3:] if name == "python" else rest
        if "needs a GPU" in line and not torch.cuda.is_available():
            printed = run_command(argv, 2, line, output)
            assert re.search(r"(no|no usable|needs a) GPU", printed), printed
            return
        if "needs a GPU" in line and argv[0] in ("bench", "tune"):
            return  # make gpu runs those
        smaller = SMALLER.get(" ".join(argv[:2])) or SMALLER.get(argv[0], [])
        run_command([*argv, *smaller], 0, line, output)
    elif words[:2] == ["python", "-m"]:
        check_options(rest[1], rest[2:])
    elif name == "python":
        assert rest[0] in scripts or (ROOT / rest[0]).is_file(), line
    elif name == "make":
        assert {word for word in rest if "=" not in word} <= make_targets(), line
    elif words[:2] == ["pip", "install"]:
        check_extras(rest[-1])
    else:
        assert words in (["cd", "triton_lstm"], [".", ".venv/bin/activate"]), f"nothing checks this: {line}"


def run_command(argv: list[str], expected: int, line: str, output: Callable[[], str]) -> str:
    output()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))  # commands set it
        try:
            status = cli.main(argv)
        except SystemExit as error:  # --help, --version
            status = int(error.code or 0)
    printed = output()
    assert status == expected and "Traceback" not in printed, f"{line}: exit status {status}\n{printed}"
    return printed


def check_options(module: str, arguments: list[str]) -> None:
    """Of a program that takes long: that its help has the options."""
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"python -m {module} --help: {done.stderr}"
    for option in arguments:
        assert not option.startswith("-") or option.split("=")[0] in done.stdout, f"{module} has no option {option}"


def check_extras(what: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = re.fullmatch(r"\.(\[(\w+)\])?", what)
    assert found and (not found[2] or found[2] in extras), f"pip install {what}: no such extra"
