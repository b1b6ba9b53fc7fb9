"""Back-propagation through time for one LSTM layer, both directions of time: one launch for all steps, in reverse.

dh[t] = dy[t] + dgates[t+1] @ W_hh      (B, H); dgates (B, 4H) are the pre-activations' gradients, i, f, g, o
then the cell of cell.py, backwards; against time dgates[t-1] is in dgates[t+1]'s place
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from triton_lstm.core.packing import side_by_side
from triton_lstm.kernels.cell import cell_backward, gates_backward
from triton_lstm.kernels.exchange import arrive, counter_at, recurrent_product, store_rows
from triton_lstm.kernels.inline import here
from triton_lstm.kernels.launch import launch
from triton_lstm.kernels.parts import add_parts
from triton_lstm.kernels.product import load_weights
from triton_lstm.kernels.segments import as_bits, begin_segment, load_resets
from triton_lstm.kernels.steps import rows_of
from triton_lstm.kernels.totals import keep_totals
from triton_lstm.planning.plan import Plan


@triton.jit(do_not_specialize=["step_begin", "step_end", "T", "B"])
def lstm_backward_kernel(
    dy_ptr,  # (N, D, H) or None
    dh_n_ptr,  # (D, B, H) or None
    dc_ptr,  # (D, B, H) accumulator dtype; in: dL/dc after step_begin, but see DC_N; out: before step_end
    dact_ptr,  # (N, D, 4H), the loss's own gradients of i, f, g, o, or None
    dc_all_ptr,  # (N, D, H), the loss's own gradients of every c, or None
    w_hh_ptr,  # (D, 4H, H)
    c0_ptr,  # (B, D, H) accumulator dtype, or None for zeros
    gates_ptr,  # (N, D, 4H)
    c_all_ptr,  # (N, D, H) accumulator dtype
    dgates_ptr,  # (N, D, 4H)
    totals_ptr,  # (N, D, 2, H) accumulator dtype, out: dL/dh and dL/dc of every step; or sums, see totals.py; or None
    starts_ptr,  # (T + 2,) int64, the first of the N rows of each step; None: B rows each
    lengths_ptr,  # (B,) int32, steps of each row of the batch, longest first; None: T each
    resets_ptr,  # (N,) uint8: 1 where a row begins a segment; not looked at in first steps; None: nowhere
    parts_ptr,  # see parts.py, zero; or None
    signals_ptr,  # (1 + D * batch tiles * COPIES, LINE) int32, zero: whether a wait gave up, and counters; or None
    step_begin,
    step_end,
    T,
    B,
    FIRST_DIRECTION: tl.constexpr,  # of time; 1 if the one against time is launched alone
    LAYER: tl.constexpr,
    TILE: tl.constexpr,
    TOTALS: tl.constexpr,  # "elements", "sums" or ""
    DC_N: tl.constexpr,  # whether dc_ptr holds c_n's gradient before the first step; else it is zero
):
    H: tl.constexpr = LAYER.H
    D: tl.constexpr = LAYER.D
    BLOCK_B: tl.constexpr = TILE.BLOCK_B
    SPLITS: tl.constexpr = TILE.SPLITS
    BLOCK_H: tl.constexpr = TILE.BLOCK_H // SPLITS  # own units
    K: tl.constexpr = 4 * H // SPLITS
    tl.static_assert(4 * H % SPLITS == 0, "the sum has no such parts")
    PACKED: tl.constexpr = starts_ptr is not None
    EXACT: tl.constexpr = dgates_ptr.dtype.element_ty.primitive_bitwidth > 16
    tiles = tl.cdiv(B, BLOCK_B)
    direction = 0
    if D == 2:
        direction = tl.program_id(2) + FIRST_DIRECTION  # of the forward pass; 1: against time
        w_hh_ptr += tl.cast(direction, tl.int64) * (4 * H * H)
        state = tl.cast(direction, tl.int64) * B * H
        dc_ptr += state
        gates_ptr += direction * 4 * H
        c_all_ptr += direction * H
        dgates_ptr += direction * 4 * H
        if dy_ptr is not None:
            dy_ptr += direction * H
        if dh_n_ptr is not None:
            dh_n_ptr += state
        if c0_ptr is not None:
            c0_ptr += direction * H
        if dact_ptr is not None:
            dact_ptr += direction * 4 * H
        if dc_all_ptr is not None:
            dc_all_ptr += direction * H
    offs_b = tl.arange(0, BLOCK_B)
    first_unit = tl.program_id(0) * BLOCK_H
    offs_h = first_unit + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    first_term = 0
    first_column = first_unit  # of the product
    if SPLITS > 1:
        first_term = tl.program_id(0) % SPLITS * K
        first_column = tl.program_id(0) // SPLITS * TILE.BLOCK_H
        w_hh_ptr += tl.cast(first_term, tl.int64) * H
    weights = ()
    if LAYER.EXCHANGE == "none":
        for gate in tl.static_range(4):
            weights = weights + (load_weights(w_hh_ptr + gate * H * H, first_unit, 0, H, LAYER, TILE),)
    elif TILE.RESIDENT:
        for k in tl.static_range((K + TILE.BLOCK_K - 1) // TILE.BLOCK_K):
            weights = weights + (load_weights(w_hh_ptr, first_column, k, K, LAYER, TILE),)

    dtype = dgates_ptr.dtype.element_ty
    gave_up = 0
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        row = tl.cast(tile, tl.int64) * BLOCK_B
        counter_ptr = counter_at(signals_ptr, direction * tiles + tile) if LAYER.EXCHANGE != "none" else None
        mask_b = row + offs_b < B
        mask = mask_b[:, None] & mask_h[None, :]
        offs = offs_b[:, None] * (D * H) + offs_h[None, :]
        offs_gates = offs_b[:, None] * (4 * D * H) + offs_h[None, :]
        offs_state = offs_b[:, None] * H + offs_h[None, :]
        mask_dc = mask
        if not DC_N:
            mask_dc = (row + offs_b < tl.where(step_begin > 0, B, 0))[:, None] & mask_h[None, :]
        dc = tl.load(dc_ptr + row * H + offs_state, mask=mask_dc, other=0.0)
        dh = tl.zeros((BLOCK_B, BLOCK_H), LAYER.ACC)
        length = T
        if PACKED:
            length = tl.load(lengths_ptr + row)
        segments = None  # which rows of dgates[t+1] count as zeros
        if resets_ptr is not None:
            bound = tl.where(direction == 0, length - step_begin, step_begin)
            segments = as_bits(load_resets(resets_ptr, starts_ptr, bound, length, row, B, BLOCK_B))
        for step in range(step_begin, tl.minimum(step_end, length) if PACKED else step_end):
            # Against the forward pass's time: t_next was handled before, t_prev holds the c that t started from
            t = length - 1 - tl.cast(step, tl.int64)
            t_next = t + 1
            t_prev = t - 1
            if D == 2:
                t = tl.where(direction == 0, t, tl.cast(step, tl.int64))
                t_next = tl.where(direction == 0, t + 1, t - 1)
                t_prev = tl.where(direction == 0, t - 1, t + 1)
            start, count = rows_of(starts_ptr, t, B)
            start_next, count_next = rows_of(starts_ptr, t_next, B)
            start_prev, count_prev = rows_of(starts_ptr, t_prev, B)
            mask_t = mask
            live = tl.where(step > 0, B - row, 0)  # rows of dgates[t+1] in this tile
            if PACKED:
                mask_t = mask & (row + offs_b < count)[:, None]
                begun = tl.where(step > 0, tl.minimum(count, count_next), 0)
                live = begun - row
            if resets_ptr is not None:  # before t, of the forward pass's steps
                resets = load_resets(resets_ptr, starts_ptr, tl.maximum(t, t_prev), length, row, B, BLOCK_B)
            # What is loaded here is looked at after the wait: before it, that would wait for device memory as well
            gates = gates_ptr + (start + row) * (4 * D * H) + offs_gates
            i = tl.load(gates, mask=mask_t, other=0.0)
            f = tl.load(gates + H, mask=mask_t, other=0.0)
            g = tl.load(gates + 2 * H, mask=mask_t, other=0.0)
            o = tl.load(gates + 3 * H, mask=mask_t, other=0.0)
            c = tl.load(c_all_ptr + (start + row) * (D * H) + offs, mask=mask_t, other=0.0)
            c_prev_ptr = c_all_ptr + (start_prev + row) * (D * H)
            if PACKED:
                before = tl.where(t_prev >= 0, count_prev, 0)
                c_prev = tl.load(c_prev_ptr + offs, mask=mask_t & (row + offs_b < before)[:, None], other=0.0)
                if c0_ptr is not None:
                    first = mask_t & (row + offs_b >= before)[:, None]
                    c_first = tl.load(c0_ptr + row * (D * H) + offs, mask=first, other=0.0)
            else:
                mask_prev = mask
                if c0_ptr is None:
                    mask_prev = (row + offs_b < tl.where(step < T - 1, B, 0))[:, None] & mask_h[None, :]
                else:
                    if step == T - 1:
                        c_prev_ptr = c0_ptr + row * (D * H)
                c_prev = tl.load(c_prev_ptr + offs, mask=mask_prev, other=0.0)
            if dy_ptr is not None:
                dy = tl.load(dy_ptr + (start + row) * (D * H) + offs, mask=mask_t, other=0.0)
            if dh_n_ptr is not None:
                begins = (row + offs_b >= begun)[:, None] if PACKED else step == 0
                dh_n = tl.load(dh_n_ptr + row * H + offs_state, mask=mask_t & begins, other=0.0)
            if dc_all_ptr is not None:
                dc_own = tl.load(dc_all_ptr + (start + row) * (D * H) + offs, mask=mask_t, other=0.0)
            if LAYER.EXCHANGE != "none":
                dh, late = recurrent_product(
                    dgates_ptr + (start_next + row) * (4 * D * H) + first_term,
                    live,
                    segments,
                    weights,
                    w_hh_ptr,
                    first_column,
                    counter_ptr,
                    tl.num_programs(0) * (step - step_begin),
                    gave_up,
                    LAYER,
                    TILE,
                )
                dh = tl.reshape(dh, (BLOCK_B, TILE.BLOCK_H))
                if LAYER.SPIN_LIMIT:
                    gave_up |= late
                if SPLITS > 1:
                    dh, late = add_parts(parts_ptr, direction * tiles + tile, dh, step, gave_up, LAYER, TILE)
                    if LAYER.SPIN_LIMIT:
                        gave_up |= late
            dh_t = dh
            dc_t = dc
            if dy_ptr is not None:
                dh_t += here(dy, LAYER).to(LAYER.ACC)
            if dh_n_ptr is not None:
                dh_t += here(dh_n, LAYER).to(LAYER.ACC)
            if dc_all_ptr is not None:
                dc_t += here(dc_own, LAYER).to(LAYER.ACC)
            c, c_prev = here(c, LAYER), here(c_prev, LAYER)
            if PACKED and c0_ptr is not None:
                c_prev += here(c_first, LAYER)
            if resets_ptr is not None:
                segments = as_bits(resets)
                c_prev = tl.where(begin_segment(segments, offs_b)[:, None], 0.0, c_prev)
            i, f = here(i, LAYER).to(LAYER.ACC), here(f, LAYER).to(LAYER.ACC)
            g, o = here(g, LAYER).to(LAYER.ACC), here(o, LAYER).to(LAYER.ACC)
            da_i, da_f, da_g, da_o, dc_t, dc_before = cell_backward(i, f, g, o, c, c_prev, dh_t, dc_t, EXACT)
            keep_totals(dh_t, dc_t, totals_ptr, start + row, offs_b, offs_h, mask_t, t, direction, TOTALS, LAYER)
            if dact_ptr is not None:
                dact = dact_ptr + (start + row) * (4 * D * H) + offs_gates
                own_i, own_f, own_g, own_o = gates_backward(i, f, g, o, dact, H, mask_t)
                da_i, da_f, da_g, da_o = da_i + own_i, da_f + own_f, da_g + own_g, da_o + own_o
            dc = tl.where(mask_t, dc_before, dc) if PACKED else dc_before
            if resets_ptr is not None:
                dc = tl.where(begin_segment(segments, offs_b)[:, None], 0.0, dc)
            dgates = dgates_ptr + (start + row) * (4 * D * H) + offs_gates
            store_rows(dgates, da_i, mask_t, LAYER)
            store_rows(dgates + H, da_f, mask_t, LAYER)
            store_rows(dgates + 2 * H, da_g, mask_t, LAYER)
            store_rows(dgates + 3 * H, da_o, mask_t, LAYER)
            if LAYER.EXCHANGE != "none":
                arrive(counter_ptr, LAYER)
            if LAYER.EXCHANGE == "none":
                if PACKED or H != BLOCK_H:  # padding may hold inf * 0 = NaN, which must not enter the product
                    da_i = tl.where(mask_t, da_i, 0.0)
                    da_f = tl.where(mask_t, da_f, 0.0)
                    da_g = tl.where(mask_t, da_g, 0.0)
                    da_o = tl.where(mask_t, da_o, 0.0)
                dh = tl.dot(da_i.to(dtype), weights[0], input_precision=LAYER.PRECISION, out_dtype=LAYER.ACC)
                dh = tl.dot(da_f.to(dtype), weights[1], dh, input_precision=LAYER.PRECISION, out_dtype=LAYER.ACC)
                dh = tl.dot(da_g.to(dtype), weights[2], dh, input_precision=LAYER.PRECISION, out_dtype=LAYER.ACC)
                dh = tl.dot(da_o.to(dtype), weights[3], dh, input_precision=LAYER.PRECISION, out_dtype=LAYER.ACC)
                if resets_ptr is not None:
                    dh = tl.where(begin_segment(segments, offs_b)[:, None], 0.0, dh)
        tl.store(dc_ptr + row * H + offs_state, dc, mask=mask)
    if LAYER.SPIN_LIMIT:
        if gave_up != 0:
            tl.store(signals_ptr, 1)


def lstm_backward(
    dy: torch.Tensor | None,
    dh_n: torch.Tensor | None,
    dc_n: torch.Tensor | None,
    w_hh: torch.Tensor,
    c0: torch.Tensor | None,
    gates: torch.Tensor,
    c_all: torch.Tensor,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    resets: torch.Tensor | None = None,
    *,
    dact: torch.Tensor | None = None,
    dc_all: torch.Tensor | None = None,
    totals: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
    plan: Plan,
    run: Callable[..., None] = launch,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the reverse-time loop, with the names and shapes of lstm_forward; D directions of time.

    Args:
        dy, dh_n, dc_n, dact, dc_all: gradients of y, h_n, c_n, the gates and every c, None for zeros.
        w_hh: (D*4H, H). gates: (T, B, D*4H) or packed (N, D*4H). c0 (D, B, H), None for zeros, and c_all of the
            accumulator's dtype. All but dc_n are contiguous.
        totals, sums: (.., D, 2, H) like c_all, or zeros of totals.py: filled with the gradients of every h and c.
        run: called in the place of `launch`.

    Returns:
        dgates (like gates), and dc0 (D, B, H) in the accumulator's dtype.
    """
    H = w_hh.shape[1]
    D = w_hh.shape[0] // (4 * H)
    dgates = torch.empty_like(gates)
    dc = c_all.new_empty(D, gates.shape[1] if lengths is None else lengths.shape[0], H)
    if dc_n is not None:
        dc.copy_(dc_n)
    arguments = dict(
        dy_ptr=dy,
        dh_n_ptr=dh_n,
        dc_ptr=dc,
        dact_ptr=dact,
        dc_all_ptr=dc_all,
        w_hh_ptr=w_hh,
        c0_ptr=c0 if c0 is None or D == 1 else side_by_side(c0).contiguous(),  # in the row layout of c_all
        gates_ptr=gates,
        c_all_ptr=c_all,
        dgates_ptr=dgates,
        totals_ptr=totals if sums is None else sums,
        starts_ptr=starts,
        lengths_ptr=lengths,
        resets_ptr=None if resets is None else resets.view(torch.uint8),
        DC_N=dc_n is not None,
        TOTALS="sums" if sums is not None else "elements" if totals is not None else "",
    )
    run(lstm_backward_kernel, plan, dgates, arguments)
    return dgates, dc
