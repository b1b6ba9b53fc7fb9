"""Correctness of a provider on a case: its output and gradients against float64, before it is timed."""

from __future__ import annotations

import copy
import dataclasses
import zlib
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from triton_lstm.core.reference import Reference
from triton_lstm.core.tolerance import NORMS, Allowance, Answer, draws, enlarge
from triton_lstm.perf.cases import Case
from triton_lstm.perf.split import in_segments


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case's module and data. twin: nn.LSTM in the case's dtype; inputs and cotangents: one per random draw."""

    case: Case
    twin: nn.LSTM
    inputs: list[torch.Tensor | PackedSequence]
    cotangents: list[torch.Tensor]


def make_problem(case: Case, device: torch.device) -> Problem:
    """Random weights, twice as large as nn.LSTM's; inputs and cotangents from N(0, 1). Seeded by the case's name."""
    torch.manual_seed(zlib.crc32(case.name.encode()))
    twin = enlarge(nn.LSTM(**case.module_arguments)).to(device, case.dtype)
    inputs, cotangents = [], []
    lengths = case.lengths()
    width = case.directions * (case.proj_size or case.H)
    for _ in range(draws(int(lengths.sum()) * min(case.I, case.proj_size or case.H))):
        shape = (case.B, case.T) if case.batch_first else (case.T, case.B)
        x: Any = torch.randn(*shape, case.I, device=device, dtype=case.dtype)
        if case.packed:
            x = pack_padded_sequence(x, lengths, batch_first=case.batch_first)
        leading = data(x).shape[:-1]
        inputs.append(x)
        cotangents.append(torch.randn(*leading, width, device=device, dtype=case.dtype))
    return Problem(case, twin, inputs, cotangents)


def data(x: torch.Tensor | PackedSequence) -> torch.Tensor:
    return x.data if isinstance(x, PackedSequence) else x


def leaf(x: Any, dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    """A copy of the input in `dtype`, and its tensor that gets a gradient."""
    fresh = data(x).detach().to(dtype, copy=True).requires_grad_()
    return (x._replace(data=fresh) if isinstance(x, PackedSequence) else fresh), fresh


def answer(module: nn.Module, problem: Problem, k: int, dtype: torch.dtype) -> Answer:
    """Output, last states and gradients of `module` on draw k. Parameters of an `inner` module keep their names.

    Raises RuntimeError if the input or a parameter got no gradient.
    """
    x, wanted = leaf(problem.inputs[k], dtype)
    module.zero_grad()
    output, states = module.train()(x)
    y = data(output)
    y.backward(problem.cotangents[k].to(dtype))
    leaves = {"x": wanted} | {name.removeprefix("inner."): p for name, p in module.named_parameters()}
    without = [name for name, tensor in leaves.items() if tensor.grad is None]
    if without:
        raise RuntimeError(f"no gradient for {', '.join(without)}")
    found = {"y": y} | {f"d{name}": tensor.grad for name, tensor in leaves.items() if tensor.grad is not None}
    if states is not None:
        found |= {"h_n": states[0], "c_n": states[1]}
    module.zero_grad()
    return {name: tensor.detach() for name, tensor in found.items()}


class Check:
    """The exact result of a problem, and the tolerance that follows from PyTorch's own error in the case's dtype.

    The reference's error counts on the CPU only, where the BLAS library's thin products require it; on a GPU it would
    store every step of long sequences in float64. With resets, the results are those of the segments run alone.
    Raises ValueError as Allowance does.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

        def answers(twin: nn.LSTM) -> tuple[list[Answer], list[Answer]]:
            module = in_segments(problem.case, twin)
            kinds = (copy.deepcopy(module).double(), torch.float64), (module, problem.case.dtype)
            exact, same = ([answer(m, problem, k, d) for k in range(len(problem.inputs))] for m, d in kinds)
            return exact, same

        reference = None
        if not next(problem.twin.parameters()).is_cuda:
            plain = Reference(**problem.case.module_arguments).to(problem.case.dtype)
            plain.load_state_dict(problem.twin.state_dict())
            reference = answers(plain)
        self.allowance = Allowance(*answers(problem.twin), reference, tf32=problem.case.precision == "tf32")

    def __call__(self, module: nn.Module) -> dict[str, Any]:
        """error: the largest RMS error relative to the RMS of the exact result; error_share: see tolerance.py.

        status "wrong" with a reason if error_share is above 1 or a shape differs. Raises as `answer` does.
        """
        got = answer(module, self.problem, self.allowance.draw, self.problem.case.dtype)
        rms = NORMS["rms"]
        shares, errors = {}, {}
        for name, tensor in got.items():
            exact = self.allowance.exact.get(name)
            if exact is None:
                continue  # a parameter in another library's layout
            if tensor.shape != exact.shape:
                reason = f"{name} is {tuple(tensor.shape)}, not {tuple(exact.shape)}"
                return {"status": "wrong", "reason": reason}
            shares[name] = self.allowance.share(name, tensor)
            errors[name] = rms(tensor.double() - exact) / max(rms(exact), torch.finfo(torch.float64).tiny)
        worst = max(shares, key=lambda name: shares[name])
        row: dict[str, Any] = {"error": max(errors.values()), "error_share": shares[worst]}
        if shares[worst] > 1:
            row |= {"status": "wrong", "reason": f"{worst} has {shares[worst]:.3g} times the allowed error"}
        return row
