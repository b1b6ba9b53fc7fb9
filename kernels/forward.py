"""Forward pass of one LSTM layer, both directions of time: one launch for all time steps, W_hh on chip.

a[t] = xg[t] + h[t-1] @ W_hh.T      (B, 4H), gates i, f, g, o along 4H; against time h[t+1] is in h[t-1]'s place
then the cell of cell.py; h[t] is y[t]
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from triton_lstm.core.packing import side_by_side
from triton_lstm.kernels.cell import cell_forward
from triton_lstm.kernels.exchange import arrive, counter_at, recurrent_product, store_rows
from triton_lstm.kernels.launch import accumulator, launch
from triton_lstm.kernels.product import load_weights
from triton_lstm.kernels.segments import as_bits, begin_segment, load_resets
from triton_lstm.kernels.steps import rows_of
from triton_lstm.planning.plan import Plan


@triton.jit(do_not_specialize=["step_begin", "step_end", "T", "B"])
def lstm_forward_kernel(
    xg_ptr,  # (N, D, 4H)
    w_hh_ptr,  # (D, 4H, H)
    h0_ptr,  # (B, D, H), or None for zeros
    c0_ptr,  # (D, B, H) accumulator dtype, or None for zeros
    c_ptr,  # (D, B, H) accumulator dtype; in: c before step_begin, if that is not the first; out: c after step_end
    y_ptr,  # (N, D, H)
    h_n_ptr,  # (D, B, H) or None; written by one program alone, which still holds it at the end
    c_n_ptr,  # (D, B, H): c after step_end in y's dtype, or None
    gates_ptr,  # (N, D, 4H) or None
    c_all_ptr,  # (N, D, H) accumulator dtype, or None
    starts_ptr,  # (T + 2,) int64, the first of the N rows of each step; None: B rows each
    lengths_ptr,  # (B,) int32, steps of each row of the batch, longest first; None: T each
    resets_ptr,  # (N,) uint8: 1 where a row begins a segment; not looked at in first steps; None: nowhere
    signals_ptr,  # (1 + D * batch tiles * COPIES, LINE) int32, zero: whether a wait gave up, and counters; or None
    step_begin,
    step_end,
    T,
    B,
    FIRST_DIRECTION: tl.constexpr,  # of time; 1 if the one against time is launched alone
    LAYER: tl.constexpr,
    TILE: tl.constexpr,
):
    H: tl.constexpr = LAYER.H
    D: tl.constexpr = LAYER.D
    BLOCK_B: tl.constexpr = TILE.BLOCK_B
    BLOCK_H: tl.constexpr = TILE.BLOCK_H
    PACKED: tl.constexpr = starts_ptr is not None
    tl.static_assert(TILE.SPLITS == 1, "only BPTT splits its sum")
    EXACT: tl.constexpr = y_ptr.dtype.element_ty.primitive_bitwidth > 16
    tiles = tl.cdiv(B, BLOCK_B)
    first_unit = tl.program_id(0) * BLOCK_H
    direction = 0
    if D == 2:
        direction = tl.program_id(2) + FIRST_DIRECTION  # 1: against time
        xg_ptr += direction * 4 * H
        w_hh_ptr += tl.cast(direction, tl.int64) * (4 * H * H)
        state = tl.cast(direction, tl.int64) * B * H
        c_ptr += state
        y_ptr += direction * H
        if c0_ptr is not None:
            c0_ptr += state
        if h_n_ptr is not None:
            h_n_ptr += state
        if c_n_ptr is not None:
            c_n_ptr += state
        if h0_ptr is not None:
            h0_ptr += direction * H
        if gates_ptr is not None:
            gates_ptr += direction * 4 * H
        if c_all_ptr is not None:
            c_all_ptr += direction * H
    weights = ()
    if TILE.RESIDENT:
        for k in tl.static_range((H + TILE.BLOCK_K - 1) // TILE.BLOCK_K):
            weights = weights + (load_weights(w_hh_ptr, first_unit, k, H, LAYER, TILE),)

    offs_b = tl.arange(0, BLOCK_B)
    offs_h = first_unit + tl.arange(0, BLOCK_H)
    dtype = y_ptr.dtype.element_ty
    gave_up = 0
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        row = tl.cast(tile, tl.int64) * BLOCK_B
        counter_ptr = counter_at(signals_ptr, direction * tiles + tile) if LAYER.EXCHANGE != "none" else None
        mask_b = row + offs_b < B
        mask = mask_b[:, None] & (offs_h < H)[None, :]
        offs = offs_b[:, None] * (D * H) + offs_h[None, :]
        offs_gates = offs_b[:, None] * (4 * D * H) + offs_h[None, :]
        offs_state = offs_b[:, None] * H + offs_h[None, :]
        mask_c = mask
        c_begin_ptr = c_ptr
        if c0_ptr is None:
            mask_c = (row + offs_b < tl.where(step_begin > 0, B, 0))[:, None] & (offs_h < H)[None, :]
        else:
            if step_begin == 0:
                c_begin_ptr = c0_ptr
        c = tl.load(c_begin_ptr + row * H + offs_state, mask=mask_c, other=0.0)
        if LAYER.EXCHANGE == "none":
            if h0_ptr is None:
                h = tl.zeros((BLOCK_B, BLOCK_H), dtype)
            else:
                h = tl.load(h0_ptr + row * (D * H) + offs, mask=mask, other=0.0)
        length = T
        if PACKED:
            length = tl.load(lengths_ptr + row)
        segments = None  # which rows of h[t-1] count as zeros
        if resets_ptr is not None:
            bound = tl.where(direction == 0, step_begin, length - step_begin)
            segments = as_bits(load_resets(resets_ptr, starts_ptr, bound, length, row, B, BLOCK_B))
        for step in range(step_begin, tl.minimum(step_end, length) if PACKED else step_end):
            t = tl.cast(step, tl.int64)
            t_prev = t - 1
            if D == 2:
                t = tl.where(direction == 0, t, length - 1 - t)
                t_prev = tl.where(direction == 0, t - 1, t + 1)
            start, count = rows_of(starts_ptr, t, B)
            start_prev, count_prev = rows_of(starts_ptr, t_prev, B)
            mask_t = mask
            live = B - row  # rows of h[t-1] in this tile
            if h0_ptr is None:
                live = tl.where(step > 0, live, 0)
            if PACKED:
                mask_t = mask & (row + offs_b < count)[:, None]
                live = tl.where(step > 0, tl.minimum(count, count_prev) - row, 0)
            xg = xg_ptr + (start + row) * (4 * D * H) + offs_gates
            x_i = tl.load(xg, mask=mask_t, other=0.0)
            x_f = tl.load(xg + H, mask=mask_t, other=0.0)
            x_g = tl.load(xg + 2 * H, mask=mask_t, other=0.0)
            x_o = tl.load(xg + 3 * H, mask=mask_t, other=0.0)
            if resets_ptr is not None:  # the next step's: before a wait nobody has to stop for what was loaded long ago
                t_next = 2 * t - t_prev
                resets = load_resets(resets_ptr, starts_ptr, tl.maximum(t, t_next), length, row, B, BLOCK_B)
            if LAYER.EXCHANGE == "none":
                a = tl.dot(h, weights[0], input_precision=LAYER.PRECISION, out_dtype=LAYER.ACC)
                a = tl.reshape(a, (BLOCK_B, BLOCK_H, 2, 2))
            else:
                rows = y_ptr + (start_prev + row) * (D * H)
                if h0_ptr is not None:
                    if step == 0:
                        rows = h0_ptr + row * (D * H)
                a, late = recurrent_product(
                    rows,
                    live,
                    segments,
                    weights,
                    w_hh_ptr,
                    first_unit,
                    counter_ptr,
                    tl.num_programs(0) * (step - step_begin),
                    gave_up,
                    LAYER,
                    TILE,
                )
                if LAYER.SPIN_LIMIT:
                    gave_up |= late
                a = tl.permute(tl.reshape(a, (2, 2, BLOCK_B, BLOCK_H)), (2, 3, 0, 1))
            a_ig, a_fo = tl.split(a)
            a_i, a_g = tl.split(a_ig)
            a_f, a_o = tl.split(a_fo)
            i, f, g, o, c_new, h_new = cell_forward(
                a_i + x_i.to(LAYER.ACC),
                a_f + x_f.to(LAYER.ACC),
                a_g + x_g.to(LAYER.ACC),
                a_o + x_o.to(LAYER.ACC),
                c,
                EXACT,
            )
            c = tl.where(mask_t, c_new, c) if PACKED else c_new
            store_rows(y_ptr + (start + row) * (D * H) + offs, h_new, mask_t, LAYER)
            if LAYER.EXCHANGE != "none":
                arrive(counter_ptr, LAYER)
            if LAYER.EXCHANGE == "none":
                if PACKED:
                    h = tl.where(mask_t, h_new.to(dtype), h)
                elif H != BLOCK_H:  # units beyond H hold inf * 0 = NaN after an infinite h0; not for the product
                    h = tl.where(mask, h_new, 0.0).to(dtype)
                else:
                    h = h_new.to(dtype)
            if gates_ptr is not None:
                gates = gates_ptr + (start + row) * (4 * D * H) + offs_gates
                tl.store(gates, i.to(dtype), mask=mask_t)
                tl.store(gates + H, f.to(dtype), mask=mask_t)
                tl.store(gates + 2 * H, g.to(dtype), mask=mask_t)
                tl.store(gates + 3 * H, o.to(dtype), mask=mask_t)
            if c_all_ptr is not None:
                tl.store(c_all_ptr + (start + row) * (D * H) + offs, c, mask=mask_t)
            if resets_ptr is not None:
                segments = as_bits(resets)
                c = tl.where(begin_segment(segments, offs_b)[:, None], 0.0, c)
                if LAYER.EXCHANGE == "none":
                    h = tl.where(begin_segment(segments, offs_b)[:, None], 0.0, h)
        tl.store(c_ptr + row * H + offs_state, c, mask=mask)
        if LAYER.EXCHANGE == "none" and h_n_ptr is not None:
            tl.store(h_n_ptr + row * H + offs_state, h, mask=mask)
        if c_n_ptr is not None:
            tl.store(c_n_ptr + row * H + offs_state, c.to(dtype), mask=mask)
    if LAYER.SPIN_LIMIT:
        if gave_up != 0:
            tl.store(signals_ptr, 1)


def lstm_forward(
    xg: torch.Tensor,
    w_hh: torch.Tensor,
    h0: torch.Tensor | None = None,
    c0: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    resets: torch.Tensor | None = None,
    *,
    plan: Plan,
    save_gates: bool = False,
    save_c: bool = False,
    run: Callable[..., None] = launch,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Runs the time loop. D directions of time; the second half of every row's features is of the one against time.

    Args:
        xg: (T, B, D*4H), or packed (N, D*4H) with starts and lengths (see triton_lstm/core/packing.py). With
            `save_gates` it holds the gates afterwards: each program reads its part of a step before it writes there.
        w_hh: (D*4H, H), of xg's dtype, as h0.
        h0: (D, B, H), or None for zeros, which packed rows always start from.
        c0: (D, B, H) of the accumulator's dtype, or None for zeros.
        resets: (T, B) or packed (N,) bool: True where a sequence's state is zero before this row; the first step's are
            not looked at. All are contiguous.
        run: called in the place of `launch`.

    Returns:
        y (like xg, with D*H features); h_n (D, B, H), None with several programs; c_n (D, B, H); if `save_c` every c
        (like y, in the accumulator's dtype).
    """
    H = w_hh.shape[1]
    D = w_hh.shape[0] // (4 * H)
    state = D, xg.shape[1] if lengths is None else lengths.shape[0], H
    dtype = accumulator(xg.dtype)
    y = xg.new_empty(*xg.shape[:-1], D * H)
    c = xg.new_empty(state, dtype=dtype)
    c_n = xg.new_empty(state) if dtype != xg.dtype else None
    h_n = xg.new_empty(state) if plan.exchange == "none" else None
    c_all = torch.empty_like(y, dtype=dtype) if save_c else None
    arguments = dict(
        xg_ptr=xg,
        w_hh_ptr=w_hh,
        h0_ptr=h0 if h0 is None or D == 1 else side_by_side(h0).contiguous(),  # in the row layout of y
        c0_ptr=c0,
        c_ptr=c,
        y_ptr=y,
        h_n_ptr=h_n,
        c_n_ptr=c_n,
        gates_ptr=xg if save_gates else None,
        c_all_ptr=c_all,
        starts_ptr=starts,
        lengths_ptr=lengths,
        resets_ptr=None if resets is None else resets.view(torch.uint8),
    )
    run(lstm_forward_kernel, plan, y, arguments)
    return y, h_n, c if c_n is None else c_n, c_all
