"""The total gradients of h and c that the time loop hands out while it runs: every element, or sums for each step."""

import torch
import triton
import triton.language as tl

from triton_lstm.planning.plan import Plan

SUMS = tl.constexpr(5)  # of squares, of values; the largest magnitude; how many are zero; how many are not finite


@triton.jit
def keep_totals(
    dh,
    dc,
    totals_ptr,
    first_row,
    offs_b,
    offs_h,
    mask,
    t,
    direction,
    TOTALS: tl.constexpr,
    LAYER: tl.constexpr,
):
    """Stores a block of step `t`, whose rows begin at `first_row`: its elements, their sums, or nothing."""
    H: tl.constexpr = LAYER.H
    D: tl.constexpr = LAYER.D
    if TOTALS == "elements":
        offs = ((first_row + offs_b)[:, None] * D + direction) * (2 * H) + offs_h[None, :]
        tl.store(totals_ptr + offs, dh, mask=mask)
        tl.store(totals_ptr + offs + H, dc, mask=mask)
    if TOTALS == "sums":
        programs = tl.num_programs(0) * tl.num_programs(1)
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        totals_ptr += ((t * D + direction) * programs + program) * (2 * SUMS)
        _add_sums(totals_ptr, dh, mask)
        _add_sums(totals_ptr + SUMS, dc, mask)


@triton.jit
def _add_sums(ptr, block, mask):
    """Adds the sums of a block, less what is masked out, to five numbers that only this program writes."""
    x = tl.where(mask, block, 0.0).to(tl.float64)  # the squares of small gradients are nothing in float32
    magnitude = tl.abs(x)
    zero = tl.where(mask & (magnitude == 0), 1.0, 0.0)
    odd = tl.where(magnitude < float("inf"), 0.0, 1.0)
    tl.store(ptr, tl.load(ptr) + tl.sum(x * x))
    tl.store(ptr + 1, tl.load(ptr + 1) + tl.sum(x))
    tl.store(ptr + 2, tl.maximum(tl.load(ptr + 2), tl.max(magnitude)))
    tl.store(ptr + 3, tl.load(ptr + 3) + tl.sum(zero))
    tl.store(ptr + 4, tl.load(ptr + 4) + tl.sum(odd))


def sums_for(plan: Plan, steps: int, directions: int, hidden_size: int, device: torch.device) -> torch.Tensor:
    """Zeros (T, D, programs, 2, 5), float64: five sums of dh and five of dc for each program."""
    programs, groups = plan.grid(hidden_size)
    return torch.zeros(steps, directions, programs * groups, 2, SUMS.value, dtype=torch.float64, device=device)
