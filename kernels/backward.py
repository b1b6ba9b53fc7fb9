"""Back-propagation through time for one LSTM layer and direction: one launch for all time steps, in reverse.

dh[t] = dy[t] + dgates[t+1] @ W_hh      (B, H); dgates (B, 4H) are the pre-activations' gradients, i, f, g, o
then the cell of cell.py, backwards
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from triton_lstm.kernels.cell import cell_backward
from triton_lstm.kernels.exchange import arrive, load_weights, recurrent_product, store_unlike_sentinel
from triton_lstm.kernels.launch import launch
from triton_lstm.plan import Plan


@triton.jit(do_not_specialize=["step_begin", "step_end", "T", "B"])
def lstm_backward_kernel(
    dy_ptr,  # (T, B, H) or None
    dh_n_ptr,  # (B, H) or None
    dc_ptr,  # (B, H) accumulator dtype; in: dL/dc after step_begin, out: dL/dc before step_end
    w_hh_ptr,  # (4H, H)
    c0_ptr,  # (B, H) accumulator dtype
    gates_ptr,  # (T, B, 4H)
    c_all_ptr,  # (T, B, H) accumulator dtype
    dgates_ptr,  # (T, B, 4H)
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
    offs_b = tl.arange(0, BLOCK_B)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_n = offs_h < H
    w_cols = w_hh_ptr + offs_h
    weights = ()
    if EXCHANGE == "none":
        for gate in tl.static_range(4):
            weights = weights + (load_weights(w_cols + gate * H * H, mask_n, 0, H, H, BLOCK_K, 1),)
    elif RESIDENT:
        for k in tl.static_range((4 * H + BLOCK_K - 1) // BLOCK_K):
            weights = weights + (load_weights(w_cols, mask_n, k, 4 * H, H, BLOCK_K, SLICES),)

    dtype = dgates_ptr.dtype.element_ty
    gave_up = 0
    for tile in range(tl.program_id(1), tl.cdiv(B, BLOCK_B), tl.num_programs(1)):
        row = tl.cast(tile, tl.int64) * BLOCK_B
        mask_b = row + offs_b < B
        mask = mask_b[:, None] & mask_n[None, :]
        offs = offs_b[:, None] * H + offs_h[None, :]
        pair = tl.arange(0, 2)
        offs_gates = (
            offs_b[:, None, None, None] * (4 * H)
            + offs_h[None, :, None, None]
            + pair[None, None, :, None] * (2 * H)
            + pair[None, None, None, :] * H
        )
        mask_gates = mask[:, :, None, None]
        dc = tl.load(dc_ptr + row * H + offs, mask=mask, other=0.0)
        dh = tl.zeros((BLOCK_B, BLOCK_H), ACC)
        for step in range(step_begin, step_end):
            # Against the forward pass's time: t_next was handled before, t_prev holds the c that t started from
            if REVERSE:
                t = tl.cast(step, tl.int64)
                t_next = t - 1
                t_prev = t + 1
            else:
                t = T - 1 - tl.cast(step, tl.int64)
                t_next = t + 1
                t_prev = t - 1
            gates = gates_ptr + (t * B + row) * (4 * H) + offs_gates
            ig, fo = tl.split(tl.load(gates, mask=mask_gates, other=0.0).to(ACC))
            i, g = tl.split(ig)
            f, o = tl.split(fo)
            c = tl.load(c_all_ptr + (t * B + row) * H + offs, mask=mask, other=0.0)
            c_prev_ptr = c_all_ptr + (t_prev * B + row) * H
            if step == T - 1:
                c_prev_ptr = c0_ptr + row * H
            c_prev = tl.load(c_prev_ptr + offs, mask=mask, other=0.0)
            own = tl.zeros((BLOCK_B, BLOCK_H), ACC)
            if dy_ptr is not None:
                own += tl.load(dy_ptr + (t * B + row) * H + offs, mask=mask, other=0.0).to(ACC)
            if dh_n_ptr is not None:
                own += tl.load(dh_n_ptr + row * H + offs, mask=mask & (step == 0), other=0.0).to(ACC)
            if EXCHANGE != "none":
                dh, late = recurrent_product(
                    dgates_ptr + (t_next * B + row) * (4 * H),
                    mask_b & (step > 0),
                    weights,
                    w_cols,
                    mask_n,
                    counter_ptr,
                    tile,
                    tl.num_programs(0) * (step - step_begin),
                    gave_up,
                    4 * H,
                    H,
                    BLOCK_H,
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
            da_i, da_f, da_g, da_o, dc = cell_backward(i, f, g, o, c, c_prev, own + dh, dc)
            dgates = dgates_ptr + (t * B + row) * (4 * H) + offs_gates
            da = tl.join(tl.join(da_i, da_g), tl.join(da_f, da_o))
            if EXCHANGE == "flag":
                store_unlike_sentinel(dgates, da, mask_gates, SENTINEL, INT)
            else:
                tl.store(dgates, da.to(dtype), mask=mask_gates)
            if EXCHANGE == "barrier":
                arrive(counter_ptr + tile)
            if EXCHANGE == "none":
                if H != BLOCK_H:  # units beyond H hold inf * 0 = NaN after an overflow, and must not reach the product
                    da_i = tl.where(mask, da_i, 0.0)
                    da_f = tl.where(mask, da_f, 0.0)
                    da_g = tl.where(mask, da_g, 0.0)
                    da_o = tl.where(mask, da_o, 0.0)
                dh = tl.dot(da_i.to(dtype), weights[0], input_precision=PRECISION, out_dtype=ACC)
                dh = tl.dot(da_f.to(dtype), weights[1], dh, input_precision=PRECISION, out_dtype=ACC)
                dh = tl.dot(da_g.to(dtype), weights[2], dh, input_precision=PRECISION, out_dtype=ACC)
                dh = tl.dot(da_o.to(dtype), weights[3], dh, input_precision=PRECISION, out_dtype=ACC)
        tl.store(dc_ptr + row * H + offs, dc, mask=mask)
    if SPIN_LIMIT:
        if gave_up != 0:
            tl.store(error_ptr, 1)


def lstm_backward(
    dy: torch.Tensor | None,
    dh_n: torch.Tensor | None,
    dc_n: torch.Tensor | None,
    w_hh: torch.Tensor,
    c0: torch.Tensor,
    gates: torch.Tensor,
    c_all: torch.Tensor,
    *,
    plan: Plan,
    reverse: bool,
    run: Callable[..., None] = launch,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the reverse-time loop.

    dy (T, B, H), dh_n (B, H), dc_n (B, H): gradients of the outputs, None for zero; w_hh (4H, H) and gates (T, B, 4H);
    c0 (B, H) and c_all (T, B, H) of the accumulator's dtype. All but dc_n contiguous.
    run: called in the place of `launch`.
    Returns dgates (T, B, 4H) and dc0 (B, H), the latter in the accumulator's dtype.
    """
    dgates = torch.empty_like(gates)
    dc = torch.zeros_like(c0) if dc_n is None else torch.empty_like(c0).copy_(dc_n)
    arguments = dict(
        dy_ptr=dy,
        dh_n_ptr=dh_n,
        dc_ptr=dc,
        w_hh_ptr=w_hh,
        c0_ptr=c0,
        gates_ptr=gates,
        c_all_ptr=c_all,
        dgates_ptr=dgates,
    )
    run(lstm_backward_kernel, plan, dgates, arguments, reverse=reverse)
    return dgates, dc
