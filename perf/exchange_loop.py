"""One exchange of h per step, and a maximum of what was read: the cost of the time loop without its arithmetic.

Uses the same device functions as the LSTM's kernels.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from triton_lstm.kernels.exchange import COPIES, LINE, arrive, await_rows, make_ready
from triton_lstm.kernels.launch import Layer, device_facts
from triton_lstm.kernels.product import load_present_rows
from triton_lstm.planning.plan import Exchange, Tile

WARPS = 8
ROWS = COLUMNS = 16  # of one program: a batch tile of 16 rows, one tensor-core tile; 16 hidden units


@triton.jit(do_not_specialize=["step_begin", "step_end"])
def exchange_kernel(
    buffer_ptr,  # (T, ROWS, W)
    counter_ptr,  # (COPIES, LINE) int32, zero
    late_ptr,  # (1,) int32, zero
    step_begin,
    step_end,
    LAYER: tl.constexpr,
    TILE: tl.constexpr,
):
    W: tl.constexpr = LAYER.H
    BLOCK_B: tl.constexpr = TILE.BLOCK_B
    BLOCK_H: tl.constexpr = TILE.BLOCK_H
    offs_b = tl.arange(0, BLOCK_B)
    mine = offs_b[:, None] * W + tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    late = 0  # 1 after a wait that gave up, or rows that were not complete
    for t in range(step_begin, step_end):
        rows_ptr = buffer_ptr + tl.cast(t, tl.int64) * (BLOCK_B * W)
        before_ptr = rows_ptr - BLOCK_B * W
        live = tl.where(t > 0, BLOCK_B, 0)
        late |= await_rows(before_ptr, live, None, counter_ptr, tl.num_programs(0) * t, late, LAYER, TILE)
        for k in range((W + TILE.BLOCK_K - 1) // TILE.BLOCK_K):
            bits = load_present_rows(before_ptr, live, None, k, False, LAYER, TILE).to(LAYER.INT, bitcast=True)
            late |= tl.max((bits == LAYER.SENTINEL).to(tl.int32))
        # The stored value depends on the loaded ones: no step can begin before the previous one is complete
        tl.store(rows_ptr + mine, tl.full((BLOCK_B, BLOCK_H), 1.0, tl.float32) + late)
        arrive(counter_ptr, LAYER)
    if late != 0:
        tl.store(late_ptr, 1)


def exchange_constants(programs: int, exchange: Exchange, backend: str, limit: int = 0) -> dict[str, Any]:
    """The kernel's compile-time constants. backend: the device's. limit: of every wait's looks; 0: none."""
    width = programs * COLUMNS
    return dict(
        LAYER=Layer.of(exchange, torch.bfloat16, width, 1, "ieee", limit, backward=False, backend=backend),
        TILE=Tile(False, ROWS, COLUMNS, min(1024, triton.next_power_of_2(width)), 1, 1, WARPS),
    )


class ExchangeLoop:
    """`programs` programs that exchange (16, 16) bf16 values each, `steps` times.

    one_launch: all steps in one cooperative launch; otherwise (in the interpreter) one launch per step. limit: of every
    wait's looks, which then has other code; 0: none.
    """

    def __init__(
        self, programs: int, steps: int, kind: Exchange, device: torch.device, one_launch: bool, limit: int = 0
    ) -> None:
        self.programs, self.steps, self.one_launch = programs, steps, one_launch
        self.constants = exchange_constants(programs, kind, device_facts(device).backend, limit)
        self.buffer = torch.empty(steps, ROWS, programs * COLUMNS, dtype=torch.bfloat16, device=device)
        self.counter = torch.zeros(COPIES.value, LINE.value, dtype=torch.int32, device=device)
        self.late = torch.zeros(1, dtype=torch.int32, device=device)

    def prepare(self) -> None:
        make_ready("flag", self.buffer, self.counter)  # the sentinel shows what was not complete to the barrier as well

    def run(self) -> None:
        self.prepare()
        arguments = dict(
            buffer_ptr=self.buffer,
            counter_ptr=self.counter,
            late_ptr=self.late,
            **self.constants,
            num_warps=WARPS,
        )
        if self.one_launch:
            exchange_kernel[self.programs,](
                step_begin=0, step_end=self.steps, launch_cooperative_grid=True, **arguments
            )
            return
        for t in range(self.steps):
            exchange_kernel[self.programs,](step_begin=t, step_end=t + 1, **arguments)

    def complete(self) -> bool:
        """Whether every value arrived and no wait gave up."""
        return bool((self.buffer == 1).all()) and not self.late.item()
