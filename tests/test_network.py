"""No network, at import or at run time: in child processes in which Python's sockets are only for this machine's files.

`train` in several processes, which talk to each other, is not among them, nor are TensorBoard and Weights & Biases.
"""

import os
import subprocess
import sys

import pytest
from child import python_path

from triton_lstm.settings import SHOWING

HOOK = """
import os, sys
def hook(event, args):
    if event == "socket.__new__":
        used = args[1] != 1  # AF_UNIX
    else:
        used = event.startswith(("socket.getaddrinfo", "socket.gethostby", "socket.getnameinfo", "urllib.Request"))
    if used:
        with open(os.environ["NETWORK_LOG"], "a") as log:  # an exception may be caught
            print(event, args[1:], file=log)
        raise OSError(f"{event}: the network is used")
sys.addaudithook(hook)
"""
IMPORTS = """
import importlib, pkgutil, triton_lstm
names = [m.name for m in pkgutil.walk_packages(triton_lstm.__path__, "triton_lstm.") if not m.name.endswith("__main__")]
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:  # of a package that is not installed
        if (error.name or "triton_lstm").startswith("triton_lstm"):
            raise
assert len(names) > 100, names
"""
CALLS = """
import torch, triton_lstm
lstm = triton_lstm.LSTM(3, 4, backend="triton")
x = torch.randn(5, 2, 3, requires_grad=True)
lstm(x)[0].sum().backward()
assert x.grad is not None
triton_lstm.explain(lstm, x)
with triton_lstm.record_gradients(lstm) as recorded:
    lstm(x)[0].sum().backward()
recorded.summary()
triton_lstm.convert(torch.nn.Sequential(torch.nn.LSTM(3, 4)))
"""
COMMANDS = """
import pathlib
from triton_lstm.cli.main import main
pathlib.Path("text.txt").write_text("the quick brown fox\\n" * 400)
tiny = "--text text.txt --steps 2 --hidden 8 --batch 2 --seq-len 8 --cache cache --device cpu".split()
for command in (["doctor"], ["train", *tiny], ["runs"], ["gradients", "--checkpoint", "runs"],
                ["bench", "--suite", "smoke", "--only", "mode=forward", "--only", "H=8", "--out", "smoke"],
                ["report", "smoke"], ["diff", "smoke", "smoke"],
                "tune --dry-run --gpu H100 --hidden 64 --batch 16".split()):
    assert main(command) == 0, command
"""


@pytest.fixture
def network(tmp_path):
    """Runs code in a process, all children of which are watched, too; returns what used the network."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    log = tmp_path / "log"

    def run(code: str, check: bool = True) -> str:
        environment = os.environ | {"PYTHONPATH": python_path(tmp_path), "NETWORK_LOG": str(log)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return log.read_text() if log.exists() else ""

    return run


@pytest.mark.parametrize("code", [IMPORTS, CALLS, COMMANDS], ids=["imports", "calls", "commands"])
def test_the_network_is_not_used(code, network, interpreter):
    if code == COMMANDS:
        for package in ("cyclopts", "filelock", "safetensors", *SHOWING):
            pytest.importorskip(package)
    assert network(code) == ""


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.socket()",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import socket; socket.socket()'])",
    ],
    ids=["socket", "name", "child"],
)
def test_its_use_is_noticed(code, network):
    assert "socket." in network(code, check=False)
