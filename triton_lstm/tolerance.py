"""The one rule that says how close an answer must be to nn.LSTM's; the tests and the benchmarks judge by it."""

from __future__ import annotations

from collections.abc import Callable

import torch

Norm = Callable[[torch.Tensor], float]

NORMS: dict[str, Norm] = {"rms": lambda t: t.square().mean().sqrt().item(), "max": lambda t: t.abs().max().item()}


def draws(elements: int) -> int:
    """On how many draws of inputs to measure PyTorch's own error: on a single one a small tensor is exact by luck."""
    return 2 if elements > 1000 else 10


def allowed(exact: torch.Tensor, own: list[torch.Tensor], norm: Norm, dtype: torch.dtype) -> float:
    """2 * (PyTorch's own error in `dtype` against float64) + eps; own: its differences, one for each draw of inputs."""
    eps = torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())
    return 2 * max(map(norm, own)) + (16 * eps if dtype == torch.float64 else eps)


def worst_share(got: torch.Tensor, exact: torch.Tensor, own: list[torch.Tensor]) -> float:
    """The error of `got` as a share of what the rule allows, by RMS or maximum, whichever is worse; NaN gives inf."""
    shares = [norm(got.double() - exact) / allowed(exact, own, norm, got.dtype) for norm in NORMS.values()]
    return max(float("inf") if share != share else share for share in shares)


def zeros_would_pass(exact: torch.Tensor, own: list[torch.Tensor], dtype: torch.dtype) -> bool:
    """Whether the rule could not tell this answer from nothing at all."""
    return bool(exact.any()) and all(norm(exact) <= allowed(exact, own, norm, dtype) for norm in NORMS.values())
