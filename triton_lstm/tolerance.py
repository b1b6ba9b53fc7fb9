"""The one rule that says how close an answer must be to nn.LSTM's; the tests and the benchmarks judge by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

Module = TypeVar("Module", bound=torch.nn.Module)
Answer = dict[str, torch.Tensor]
Errors = dict[str, float]  # by the names of NORMS
Norm = Callable[[torch.Tensor], float]

AGREEMENT = 1e-12  # of the reference and nn.LSTM in float64
NORMS: dict[str, Norm] = {"rms": lambda t: t.square().mean().sqrt().item(), "max": lambda t: t.abs().max().item()}


def draws(elements: int) -> int:
    """On how many draws of inputs to measure PyTorch's own error: on a single one a small tensor is exact by luck.

    elements: of the smallest tensor that the others come from: a few hidden units make a large gradient of few numbers.
    """
    return 2 if elements > 1000 else 10


def rounding(dtype: torch.dtype, *, tf32: bool = False) -> float:
    """eps: that of `dtype`, sixteen of them for float64; for float32 with TF32 allowed, TF32's."""
    if tf32:
        return 2**-10
    return torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)


def errors(differences: Iterable[torch.Tensor]) -> Errors:
    """The largest norms of PyTorch's differences from what is exact, one for each draw of inputs; NaN where one is not
    finite."""
    norms = [{name: norm(difference) for name, norm in NORMS.items()} for difference in differences]
    found = {name: [of_one[name] for of_one in norms] for name in NORMS}
    return {name: max(values) if all(map(math.isfinite, values)) else math.nan for name, values in found.items()}


def allowed(exact: torch.Tensor, own: Errors, eps: float) -> Errors:
    """2 * own + eps * max(1, max |exact|), by norm. own: PyTorch's own error; eps: the dtype's `rounding`."""
    scale = max(1.0, exact.abs().max().item())
    return {name: 2 * error + eps * scale for name, error in own.items()}


def worst_share(got: torch.Tensor, exact: torch.Tensor, own: Errors, *, tf32: bool = False) -> float:
    """The error of `got` as a share of what the rule allows, by RMS or maximum, whichever is worse; NaN gives inf."""
    limits, difference = allowed(exact, own, rounding(got.dtype, tf32=tf32)), got.double() - exact
    shares = [norm(difference) / limits[name] for name, norm in NORMS.items()]
    return max(float("inf") if share != share else share for share in shares)


def zeros_would_pass(exact: torch.Tensor, own: Errors, dtype: torch.dtype, *, tf32: bool = False) -> bool:
    """Whether the rule could not tell this answer from nothing at all."""
    limits = allowed(exact, own, rounding(dtype, tf32=tf32))
    return bool(exact.any()) and all(norm(exact) <= limits[name] for name, norm in NORMS.items())


class Allowance:
    """The rule for answers by name, each on several draws of inputs.

    exact, same: nn.LSTM's in float64 and in the dtype.
    reference: those of reference.py in float64 and in the dtype. Its own error counts too: nn.LSTM multiplies in
        another order, and some processors' libraries sum thin products, which both paths need, in one long chain.
    draw: the first draw on which an all-zero answer would fail under every name; `exact` and `share` are of that one.

    Raises ValueError if there is none, where PyTorch's own error is not finite, and where reference and nn.LSTM differ
    in float64 by more than 1e-12 * max(1, max |exact|).
    """

    def __init__(
        self,
        exact: list[Answer],
        same: list[Answer],
        reference: tuple[list[Answer], list[Answer]] | None = None,
        *,
        tf32: bool = False,
    ) -> None:
        self.tf32 = tf32
        answers = [same]
        if reference is not None:
            _check_reference(exact, reference[0])
            answers.append(reference[1])
        self.own = {
            name: errors(s[name].double() - e[name] for of_one in answers for s, e in zip(of_one, exact, strict=True))
            for name in same[0]
        }
        for name, own in self.own.items():
            if any(map(math.isnan, own.values())):
                raise ValueError(f"PyTorch's own error of {name} is not finite, so nothing can be allowed")
        biting = [
            k
            for k, e in enumerate(exact)
            if not any(zeros_would_pass(e[n], self.own[n], t.dtype, tf32=tf32) for n, t in same[0].items())
        ]
        if not biting:
            raise ValueError("no draw of inputs on which an all-zero answer would fail")
        self.draw, self.exact = biting[0], exact[biting[0]]

    def share(self, name: str, got: torch.Tensor) -> float:
        """The error of `got` as a share of what is allowed."""
        return worst_share(got, self.exact[name], self.own[name], tf32=self.tf32)


def _check_reference(exact: list[Answer], reference: list[Answer]) -> None:
    for k, (theirs, ours) in enumerate(zip(exact, reference, strict=True)):
        for name, tensor in theirs.items():
            difference = (ours[name] - tensor).abs().max().item()
            if not difference <= AGREEMENT * max(1.0, tensor.abs().max().item()):
                raise ValueError(
                    f"the reference is no oracle: in float64 its {name} of draw {k} is {difference:.3g} off nn.LSTM's"
                )


def enlarge(module: Module) -> Module:
    """Doubles the weights: an untrained LSTM's small outputs lie below the rule's eps in 16 bits."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(2)
    return module
