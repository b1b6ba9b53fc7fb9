"""The tolerance for comparisons with nn.LSTM, used by the tests and the benchmarks."""

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
    """The number of random draws on which PyTorch's own error is measured: a single small one may be exact by luck.

    elements: of the smallest tensor on which the others depend, since few hidden units limit a large gradient, too.
    """
    return 2 if elements > 1000 else 10


def rounding(dtype: torch.dtype, *, tf32: bool = False) -> float:
    """eps of `dtype`, times sixteen for float64; for float32 with TF32 allowed, that of TF32."""
    if tf32:
        return 2**-10
    return torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)


def errors(differences: Iterable[torch.Tensor]) -> Errors:
    """The largest norm over all draws of PyTorch's deviations from the exact result; NaN if one is not finite."""
    norms = [{name: norm(difference) for name, norm in NORMS.items()} for difference in differences]
    found = {name: [of_one[name] for of_one in norms] for name in NORMS}
    return {name: max(values) if all(map(math.isfinite, values)) else math.nan for name, values in found.items()}


def allowed(exact: torch.Tensor, own: Errors, eps: float) -> Errors:
    """2 * own + eps * max(1, max |exact|), by norm. own: PyTorch's own error; eps: the dtype's `rounding`."""
    scale = max(1.0, exact.abs().max().item())
    return {name: 2 * error + eps * scale for name, error in own.items()}


def worst_share(got: torch.Tensor, exact: torch.Tensor, own: Errors, *, tf32: bool = False) -> float:
    """The error of `got` as a fraction of the allowed one, by RMS or maximum, whichever is worse; inf for NaN."""
    limits, difference = allowed(exact, own, rounding(got.dtype, tf32=tf32)), got.double() - exact
    shares = [norm(difference) / limits[name] for name, norm in NORMS.items()]
    return max(float("inf") if share != share else share for share in shares)


def zeros_would_pass(exact: torch.Tensor, own: Errors, dtype: torch.dtype, *, tf32: bool = False) -> bool:
    """Whether all zeros would be within the tolerance of this result."""
    limits = allowed(exact, own, rounding(dtype, tf32=tf32))
    return bool(exact.any()) and all(norm(exact) <= limits[name] for name, norm in NORMS.items())


class Allowance:
    """The tolerance for named results, from several random draws.

    exact, same: nn.LSTM's results in float64 and in the tested dtype.
    reference: those of reference.py in float64 and in the dtype. Its own error counts as well: nn.LSTM multiplies in
        another order, and the BLAS of some processors sums thin products, which both paths need, sequentially.
    draw: the first draw on which all zeros would fail for every name; `exact` and `share` refer to it.

    Raises ValueError if there is no such draw, if PyTorch's own error is not finite, or if reference and nn.LSTM
    differ in float64 by more than 1e-12 * max(1, max |exact|).
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
                raise ValueError(f"PyTorch's own error of {name} is not finite, so there is no tolerance")
        usable = [
            k
            for k, e in enumerate(exact)
            if not any(zeros_would_pass(e[n], self.own[n], t.dtype, tf32=tf32) for n, t in same[0].items())
        ]
        if not usable:
            raise ValueError("no random draw on which an all-zero result would fail")
        self.draw, self.exact = usable[0], exact[usable[0]]

    def share(self, name: str, got: torch.Tensor) -> float:
        """The error of `got` as a fraction of the allowed one."""
        return worst_share(got, self.exact[name], self.own[name], tf32=self.tf32)


def _check_reference(exact: list[Answer], reference: list[Answer]) -> None:
    for k, (theirs, ours) in enumerate(zip(exact, reference, strict=True)):
        for name, tensor in theirs.items():
            difference = (ours[name] - tensor).abs().max().item()
            if not difference <= AGREEMENT * max(1.0, tensor.abs().max().item()):
                raise ValueError(
                    f"the reference is wrong: in float64, its {name} of draw {k} is {difference:.3g} off nn.LSTM's"
                )


def enlarge(module: Module) -> Module:
    """Doubles the weights: the small outputs of an untrained LSTM are below the tolerance's eps in 16 bits."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(2)
    return module
