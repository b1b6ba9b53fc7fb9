"""Forward pass of one LSTM layer and direction: one launch for all time steps, W_hh on chip.

a[t] = xg[t] + h[t-1] @ W_hh.T      (B, 4H), gates i, f, g, o along 4H
then the cell of cell.py; h[t] is y[t]
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from triton_lstm.kernels.cell import cell_forward
from triton_lstm.kernels.exchange import arrive, load_weights, recurrent_product, store_unlike_sentinel
from triton_lstm.kernels.launch import launch
from triton_lstm.plan import Plan


@triton.jit(do_not_specialize=["step_begin", "step_end", "T", "B"])
def lstm_forward_kernel(
    xg_ptr,  # (T, B, 4H)
    w_hh_ptr,  # (4H, H)
    h0_ptr,  # (B, H)
    c_ptr,  # (B, H) accumulator dtype; in: c before step_begin, out: c after step_end
    y_ptr,  # (T, B, H)
    gates_ptr,  # (T, B, 4H) or None
    c_all_ptr,  # (T, B, H) accumulator dtype, or None
    counter_ptr,  # (batch tiles,) int32, zero
    error_ptr,  # (1,) int32, zero
    step_begin,
    step_end,
    T,
    B,
    H: tl.constexpr,
    REVERSE: tl.constexpr,
    EXCHANGE: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    SENTINEL: tl.constexpr,
    INT: tl.constexpr,
    SPIN_LIMIT: tl.constexpr,
):
    first_unit = tl.program_id(0) * BLOCK_H
    # Column 4 * unit + gate: one conversion of the product then gives a thread all four gates of its units
    column = tl.arange(0, 4 * BLOCK_H)
    unit = first_unit + column // 4
    mask_n = unit < H
    w_cols = w_hh_ptr + (column % 4 * H + unit).to(tl.int64) * H
    weights = ()
    if RESIDENT:
        for k in tl.static_range((H + BLOCK_K - 1) // BLOCK_K):
            weights = weights + (load_weights(w_cols, mask_n, k, H, 1, BLOCK_K, SLICES),)

    offs_b = tl.arange(0, BLOCK_B)
    offs_h = first_unit + tl.arange(0, BLOCK_H)
    dtype = y_ptr.dtype.element_ty
    gave_up = 0
    for tile in range(tl.program_id(1), tl.cdiv(B, BLOCK_B), tl.num_programs(1)):
        row = tl.cast(tile, tl.int64) * BLOCK_B
        mask_b = row + offs_b < B
        mask = mask_b[:, None] & (offs_h < H)[None, :]
        offs = offs_b[:, None] * H + offs_h[None, :]
        offs_gates = offs_b[:, None] * (4 * H) + offs_h[None, :]
        c = tl.load(c_ptr + row * H + offs, mask=mask, other=0.0)
        if EXCHANGE == "none":
            h = tl.load(h0_ptr + row * H + offs, mask=mask, other=0.0)
        for step in range(step_begin, step_end):
            if REVERSE:
                t = T - 1 - tl.cast(step, tl.int64)
                t_prev = t + 1
            else:
                t = tl.cast(step, tl.int64)
                t_prev = t - 1
            xg = xg_ptr + (t * B + row) * (4 * H) + offs_gates
            x_i = tl.load(xg, mask=mask, other=0.0)
            x_f = tl.load(xg + H, mask=mask, other=0.0)
            x_g = tl.load(xg + 2 * H, mask=mask, other=0.0)
            x_o = tl.load(xg + 3 * H, mask=mask, other=0.0)
            if EXCHANGE == "none":
                a = tl.dot(h, weights[0], input_precision=PRECISION, out_dtype=ACC)
            else:
                rows = y_ptr + (t_prev * B + row) * H
                if step == 0:
                    rows = h0_ptr + row * H
                a, late = recurrent_product(
                    rows,
                    mask_b,
                    weights,
                    w_cols,
                    mask_n,
                    counter_ptr,
                    tile,
                    tl.num_programs(0) * (step - step_begin),
                    gave_up,
                    H,
                    1,
                    4 * BLOCK_H,
                    BLOCK_B,
                    BLOCK_K,
                    SLICES,
                    RESIDENT,
                    EXCHANGE,
                    PRECISION,
                    ACC,
                    SENTINEL,
                    INT,
                    SPIN_LIMIT,
                )
                if SPIN_LIMIT:
                    gave_up |= late
            a_ig, a_fo = tl.split(tl.reshape(a, (BLOCK_B, BLOCK_H, 2, 2)))
            a_i, a_g = tl.split(a_ig)
            a_f, a_o = tl.split(a_fo)
            i, f, g, o, c, h_new = cell_forward(
                a_i + x_i.to(ACC), a_f + x_f.to(ACC), a_g + x_g.to(ACC), a_o + x_o.to(ACC), c
            )
            y = y_ptr + (t * B + row) * H + offs
            if EXCHANGE == "flag":
                store_unlike_sentinel(y, h_new, mask, SENTINEL, INT)
            else:
                tl.store(y, h_new.to(dtype), mask=mask)
            if EXCHANGE == "barrier":
                arrive(counter_ptr + tile)
            if EXCHANGE == "none":
                if (
                    H != BLOCK_H
                ):  # units beyond H hold inf * 0 = NaN after an infinite h0, and must not reach the product
                    h_new = tl.where(mask, h_new, 0.0)
                h = h_new.to(dtype)
            if gates_ptr is not None:
                gates = gates_ptr + (t * B + row) * (4 * H) + offs_gates
                tl.store(gates, i.to(dtype), mask=mask)
                tl.store(gates + H, f.to(dtype), mask=mask)
                tl.store(gates + 2 * H, g.to(dtype), mask=mask)
                tl.store(gates + 3 * H, o.to(dtype), mask=mask)
                tl.store(c_all_ptr + (t * B + row) * H + offs, c, mask=mask)
        tl.store(c_ptr + row * H + offs, c, mask=mask)
    if SPIN_LIMIT:
        if gave_up != 0:
            tl.store(error_ptr, 1)


def lstm_forward(
    xg: torch.Tensor,
    w_hh: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    *,
    plan: Plan,
    reverse: bool,
    save: bool,
    run: Callable[..., None] = launch,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Runs the time loop.

    xg (T, B, 4H), w_hh (4H, H), h0 (B, H): contiguous, of one dtype; c0 (B, H) of the accumulator's dtype.
    Returns y (T, B, H), the last c (B, H) and, if `save`, every c (T, B, H); both c in the accumulator's dtype.
    run: called in the place of `launch`.
    With `save`, xg holds the gates afterwards: each program reads its part of a step before it writes there.
    """
    steps, batch, _ = xg.shape
    y = torch.empty(steps, batch, w_hh.shape[1], dtype=xg.dtype, device=xg.device)
    c = c0.clone(memory_format=torch.contiguous_format)
    c_all = torch.empty(y.shape, dtype=c.dtype, device=xg.device) if save else None
    arguments = dict(
        xg_ptr=xg, w_hh_ptr=w_hh, h0_ptr=h0, c_ptr=c, y_ptr=y, gates_ptr=xg if save else None, c_all_ptr=c_all
    )
    run(lstm_forward_kernel, plan, y, arguments, reverse=reverse)
    return y, c, c_all
