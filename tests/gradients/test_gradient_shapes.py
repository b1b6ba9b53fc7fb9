"""The three cases of input and output gradients, and the command that shows them."""

import os

import pytest
import torch
from torch import nn

from triton_lstm.cli import gradients as gradient_commands
from triton_lstm.cli import main as cli
from triton_lstm.gradients import shapes as gradient_shapes

SHAPES = {
    "one layer, one step": ((3, 1, 10), (3, 1, 20)),
    "one layer, five steps, loss on the last": ((5, 3, 10), (5, 3, 20)),
    "two layers, five steps, batch_first": ((3, 5, 10), (3, 5, 20)),
}


@pytest.mark.parametrize("case", gradient_shapes.CASES, ids=lambda case: case.name)
def test_against_nn_lstm(case, device):
    x, output = gradient_shapes.run_case(case, device=device)
    x_ref, output_ref = gradient_shapes.run_case(case, nn.LSTM, device=device)
    assert (tuple(x.shape), tuple(output.shape)) == SHAPES[case.name]
    assert x.grad.shape == x.shape and output.grad.shape == output.shape
    close = dict(rtol=1e-2, atol=1e-2) if device.type == "cuda" else dict(rtol=1e-5, atol=1e-6)
    for got, expected in ((output, output_ref), (x.grad, x_ref.grad), (output.grad, output_ref.grad)):
        torch.testing.assert_close(got, expected, **close)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("case", gradient_shapes.CASES, ids=lambda case: case.name)
def test_output_grad_is_none_unless_retained(case, device):
    assert gradient_shapes.run_case(case, device=device, retain=False)[1].grad is None
    assert gradient_shapes.run_case(case, device=device)[1].grad is not None


def test_the_loss_uses_the_last_step_only(device):
    x, output = gradient_shapes.run_case(gradient_shapes.CASES[1], device=device)
    assert not output.grad[:-1].any() and (output.grad[-1] == 1).all()
    assert all(step.any() for step in x.grad)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_table_is_as_wide_as_the_output(columns, capsys, monkeypatch, device):
    """Folded, with nothing lost."""
    monkeypatch.setenv("COLUMNS", str(columns))
    gradient_commands._print_shapes(device)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    words = " ".join(lines).replace(",", " ").split()
    for row in gradient_shapes.rows(device):
        for name, text in row.items():
            for word in f"{name} {text}".replace(",", " ").replace("_", " ").split():
                assert name == "case" or word in words, f"{word} of {text}"


def test_command(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))  # the command sets it
    assert cli.main(["gradients"]) == 0
    out = capsys.readouterr().out
    for text in ("(3, 1, 10)", "(3, 1, 20)", "(5, 3, 20)", "(3, 5, 20)", "None", "1 of 5 (t = 4)", "5 of 5"):
        assert text in out
