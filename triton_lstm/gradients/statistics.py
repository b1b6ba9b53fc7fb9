"""Per-step statistics of a gradient, and how much of it enters directly at each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from triton_lstm.core.packing import Index, add_to_last_rows

GATES = ("i", "f", "g", "o")
SATURATED = 0.01  # a gate this close to an end of its range


class StepStatistics(NamedTuple):
    r"""Statistics of a gradient at each of T time steps, over all sequences and features of the step.

    Attributes:
        norm: the 2-norm :math:`\sqrt{\sum_j v_j^2}`.
        mean: the mean.
        max: the largest magnitude, :math:`\max_j |v_j|`.
        zeros: the fraction of values that are exactly 0.
        nonfinite: the fraction of values that are infinite or NaN.

    Each is a (T,) float64 tensor.

    Example::

        import torch
        import triton_lstm

        lstm = triton_lstm.LSTM(8, 16)
        with triton_lstm.record_gradients(lstm, reduce="norm") as grads:
            lstm(torch.randn(5, 2, 8))[0].sum().backward()
        statistics = grads[0].statistics()["hidden"]
        print(statistics.norm, statistics.nonfinite)
    """

    norm: torch.Tensor
    mean: torch.Tensor
    max: torch.Tensor
    zeros: torch.Tensor
    nonfinite: torch.Tensor


def per_step(rows: torch.Tensor, starts: Index) -> StepStatistics:
    """Of dense rows (T, B, F) or packed ones (N, F)."""
    rows = rows.cpu() if rows.device.type == "mps" else rows  # MPS has no float64
    wide = torch.float64
    if rows.numel():
        largest = torch.linalg.vector_norm(rows, float("inf"), dim=-1).to(wide)
    else:
        largest = rows.new_zeros(rows.shape[:-1], dtype=wide)
    parts = [
        torch.linalg.vector_norm(rows, dim=-1, dtype=wide).square(),
        rows.sum(-1, dtype=wide),
        rows.shape[-1] - torch.linalg.vector_norm(rows, 0, dim=-1, dtype=wide),
        rows.shape[-1] - rows.isfinite().sum(-1, dtype=wide),
    ]
    squares, sums, zeros, odd = (_over_sequences(part, starts) for part in parts)
    if starts is None:
        largest = torch.cat([largest, largest.new_zeros(len(largest), 1)], 1).amax(1)
    else:
        largest = largest.new_zeros(len(starts) - 2).scatter_reduce_(0, _step_of(starts, rows), largest, "amax")
    return _statistics(squares, sums, largest, zeros, odd, elements(rows.shape[-1], rows, starts))


def asked(
    cotangents: Sequence[torch.Tensor | None], leading: torch.Size, directions: int, starts: Index
) -> list[torch.Tensor]:
    """Per direction of time, (T,) float64: the norm of the gradient that enters directly at each step, from the loss
    and the layers above, and not through time.

    cotangents: of y, h_n, c_n, the gates and every c, or None. Rows (*leading, D*F); states (D, B, F).
    """
    cotangents = [None if t is None else t.cpu() if t.device.type == "mps" else t for t in cotangents]
    h, h_n, c_n, gates, c = cotangents
    result = []
    for d in range(directions):
        parts = []
        for rows, last in ((h, h_n), (c, c_n), (gates, None)):
            part = None if rows is None else rows.chunk(directions, -1)[d]
            if last is not None:
                added = last[d].to(torch.promote_types(last.dtype, torch.float32))
                part = added.new_zeros(*leading, added.shape[-1]) if part is None else part.to(added.dtype, copy=True)
                add_to_last_rows(part, added, starts, against_time=d == 1)
            if part is not None:
                parts.append(torch.linalg.vector_norm(part, dim=-1, dtype=torch.float64).square())
        result.append(_over_sequences(torch.stack(parts).sum(0), starts).sqrt())
    return result


def saturation(gates: torch.Tensor, starts: Index) -> torch.Tensor:
    """(T, 4): the fraction of i, f, g, o within 0.01 of an end of their range, where hardly any gradient passes.

    gates: the gates themselves, dense (T, B, 4H) or packed (N, 4H).
    """
    by_gate = gates.unflatten(-1, (4, -1))
    lower = torch.tensor([SATURATED, SATURATED, SATURATED - 1, SATURATED], dtype=gates.dtype, device=gates.device)
    saturated = (by_gate < lower.unsqueeze(-1)) | (by_gate > 1 - SATURATED)
    count = torch.as_tensor(elements(by_gate.shape[-1], gates, starts), device=gates.device)
    return _over_sequences(saturated.sum(-1), starts) / count.reshape(-1, 1)


def fraction_begun(resets: torch.Tensor, starts: Index) -> torch.Tensor:
    """(T,) float64: the fraction of each step's sequences in which a segment begins; resets (T, B), (N,)."""
    resets = resets.cpu() if resets.device.type == "mps" else resets
    begun = _over_sequences(resets.double(), starts)
    return begun / elements(1, resets, starts)


def _over_sequences(rows: torch.Tensor, starts: Index) -> torch.Tensor:
    """(T, B, ..) or packed (N, ..) -> (T, ..), summed over a step's sequences."""
    if starts is None:
        return rows.sum(1)
    return rows.new_zeros(len(starts) - 2, *rows.shape[1:]).index_add_(0, _step_of(starts, rows), rows)


def _step_of(starts: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The time step of each packed row."""
    return torch.repeat_interleave(starts.diff()[:-1], output_size=len(rows))


def elements(width: int, rows: torch.Tensor, starts: Index) -> torch.Tensor | int:
    """The number of values at each step, with `width` features."""
    return width * rows.shape[1] if starts is None else width * starts.diff()[:-1]


def from_sums(sums: torch.Tensor, count: torch.Tensor | int) -> StepStatistics:
    """From the sums (T, programs, 5) of kernels/totals.py."""
    squares, total, largest, zeros, odd = sums.unbind(-1)
    return _statistics(squares.sum(1), total.sum(1), largest.amax(1), zeros.sum(1), odd.sum(1), count)


def _statistics(
    squares: torch.Tensor,
    sums: torch.Tensor,
    largest: torch.Tensor,
    zeros: torch.Tensor,
    odd: torch.Tensor,
    count: torch.Tensor | int,
) -> StepStatistics:
    norm = squares.sqrt()
    return StepStatistics(norm, sums / count, torch.where(norm.isnan(), norm, largest), zeros / count, odd / count)


def of_rows(rows: dict[str, torch.Tensor], starts: Index) -> dict[str, StepStatistics]:
    """The statistics of one direction's quantities, separately for each gate."""
    result = {}
    for name, data in rows.items():
        if name == "gates":
            for gate, part in zip(GATES, data.chunk(4, -1), strict=True):
                result[gate] = per_step(part, starts)
        elif name in ("h0", "c0"):
            result[name] = per_step(data.unsqueeze(0), None)
        else:
            result[name] = per_step(data, starts)
    return result
