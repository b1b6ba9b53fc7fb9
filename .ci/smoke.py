"""Tries an installed triton-lstm outside of any checkout: kernels in Triton's interpreter against nn.LSTM, and the
commands of the extra `train` if it is named."""

import os
import subprocess
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch

import triton_lstm

COMMAND = Path(sys.prefix, "bin", "triton-lstm")


def run(*arguments: str) -> str:
    print("$ triton-lstm", *arguments, flush=True)
    return subprocess.run([COMMAND, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def gradients(lstm: torch.nn.LSTM, x: torch.Tensor) -> list[torch.Tensor]:
    leaf = x.clone().requires_grad_()
    output, (h_n, c_n) = lstm(leaf)
    inputs = [leaf, *lstm.parameters()]
    return [output, h_n, c_n, *torch.autograd.grad(output.sin().sum() + h_n.sum() + c_n.sum(), inputs)]


package = Path(triton_lstm.__file__)
assert "site-packages" in package.parts, f"{package} is not installed"
assert run("--version") == f"triton-lstm {triton_lstm.__version__}\n"
assert triton_lstm.__version__ in run("doctor")

own = triton_lstm.LSTM(3, 16, num_layers=2, bidirectional=True, backend="triton")
theirs = torch.nn.LSTM(3, 16, num_layers=2, bidirectional=True)
theirs.load_state_dict(own.state_dict())
x = torch.randn(5, 4, 3)
for ours, expected in zip(gradients(own, x), gradients(theirs, x), strict=True):
    torch.testing.assert_close(ours, expected)

if "train" in sys.argv[1:]:  # the extra is installed
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    run("train", "--text", "text.txt", "--steps", "2", "--hidden", "16", "--batch", "2")
    run("runs")
    run("bench", "--suite", "smoke", "--only", "mode=forward", "--only", "H=8", "--out", "smoke")
print(f"triton-lstm {triton_lstm.__version__} works in {sys.prefix}")
