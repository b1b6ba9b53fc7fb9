"""Three small cases that show the gradients of an LSTM and their shapes."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch

from triton_lstm.gradients.record import record_gradients
from triton_lstm.gradients.results import Gradients
from triton_lstm.module import LSTM


@dataclasses.dataclass(frozen=True)
class Case:
    """An LSTM and a loss: the sum of the output, or of its last time step."""

    name: str
    input_shape: tuple[int, int, int]
    hidden_size: int
    layers: int = 1
    batch_first: bool = False
    last_only: bool = False


CASES = (
    Case("one layer, one step", (3, 1, 10), 20, batch_first=True),
    Case("one layer, five steps, loss on the last", (5, 3, 10), 20, last_only=True),
    Case("two layers, five steps, batch_first", (3, 5, 10), 20, layers=2, batch_first=True),
)


def loss_of(case: Case, output: torch.Tensor) -> torch.Tensor:
    if case.last_only:
        output = output[:, -1] if case.batch_first else output[-1]
    return output.sum()


def run_case(
    case: Case, lstm_class: Any = LSTM, device: torch.device | str = "cpu", retain: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs forward and backward with seed 0; returns the input and the output, which has a .grad only if `retain`."""
    module, x = _module_and_input(case, lstm_class, device)
    output, _ = module(x)
    if retain:
        output.retain_grad()
    loss_of(case, output).backward()
    return x, output


def record_case(case: Case, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """As run_case without retained gradients, under record_gradients."""
    module, x = _module_and_input(case, LSTM, device)
    with record_gradients(module) as grads:
        output, _ = module(x)
        loss_of(case, output).backward()
    return x, output, grads


def _module_and_input(case: Case, lstm_class: Any, device: torch.device | str) -> tuple[Any, torch.Tensor]:
    """Both initialized with seed 0."""
    torch.manual_seed(0)
    module = lstm_class(case.input_shape[2], case.hidden_size, case.layers, batch_first=case.batch_first)
    return module.to(device), torch.randn(case.input_shape).to(device).requires_grad_()


def steps_with_gradient(case: Case, grad: torch.Tensor) -> str:
    """The time steps at which a gradient is nonzero, as in "2 of 5 (t = 3, 4)"."""
    by_step = grad.transpose(0, 1) if case.batch_first else grad
    nonzero = [t for t, g in enumerate(by_step) if g.abs().max() > 0]
    return f"{len(nonzero)} of {len(by_step)} (t = {', '.join(map(str, nonzero))})"


def rows(device: torch.device | str) -> list[dict[str, str]]:
    """One table row per case."""
    result = []
    for case in CASES:
        x, plain, grads = record_case(case, device)
        _, output = run_case(case, device=device)
        assert x.grad is not None and output.grad is not None
        top, bottom = grads.select(layer=-1), grads.select(layer=0)
        result.append(
            {
                "case": case.name,
                "input": str(tuple(x.shape)),
                "output": str(tuple(output.shape)),
                "input.grad": str(tuple(x.grad.shape)),
                "output.grad": "None" if _grad_of(plain) is None else "set",
                "retained": str(tuple(output.grad.shape)),
                "grads.output": str(tuple(top.output.shape)),
                "grads.hidden": str(tuple(top.hidden.shape)),
                "grads.gates": str(tuple(top.gates.all.shape)),
                "grads.h0": str(tuple(bottom.h0.shape)),
                "grads.output nonzero": steps_with_gradient(case, top.output),
                "grads.hidden nonzero": steps_with_gradient(case, top.hidden),
                "input.grad nonzero": steps_with_gradient(case, x.grad),
            }
        )
    return result


def _grad_of(tensor: torch.Tensor) -> torch.Tensor | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that a non-leaf's .grad is None, which the table is to show
        return tensor.grad
