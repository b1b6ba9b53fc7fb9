"""One exchange of h per step and nothing else: what the time loop costs without its arithmetic.

Built of the very functions that the LSTM's kernels wait with.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from triton_lstm.kernels.exchange import INT_TYPE, SENTINEL, arrive, fill_with_sentinel, missing, wait

WARPS = 8
ROWS = COLUMNS = 16  # of one program: a batch tile of one tensor-core tile's rows, 16 hidden units
SPINS = 1 << 20  # of a wait before it gives up


@triton.jit(do_not_specialize=["step_begin", "step_end"])
def exchange_kernel(
    buffer_ptr,  # (T, ROWS, W)
    counter_ptr,  # (1,) int32, zero
    late_ptr,  # (1,) int32, zero
    step_begin,
    step_end,
    W: tl.constexpr,
    FLAG: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SENTINEL: tl.constexpr,
    INT: tl.constexpr,
    SPIN_LIMIT: tl.constexpr,
):
    offs_b = tl.arange(0, BLOCK_B)
    mine = offs_b[:, None] * W + tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    mask_b = offs_b < BLOCK_B
    late = 0  # 1 after a wait that ran out, and nothing is waited for any more
    for t in range(step_begin, step_end):
        rows_ptr = buffer_ptr + tl.cast(t, tl.int64) * (BLOCK_B * W)
        if t > 0:
            before_ptr = rows_ptr - BLOCK_B * W
            if FLAG:
                n = late * (SPIN_LIMIT - 1)
                while n < SPIN_LIMIT:
                    late = missing(before_ptr, mask_b, W, W, BLOCK_B, BLOCK_K, SENTINEL, INT)
                    n = tl.where(late != 0, n + 1, SPIN_LIMIT)
            else:
                late |= wait(counter_ptr, tl.num_programs(0) * t, late, SPIN_LIMIT)
                late |= missing(before_ptr, mask_b, W, W, BLOCK_B, BLOCK_K, SENTINEL, INT)
        # What was seen goes into what is stored: no step can begin before the last one is complete
        tl.store(rows_ptr + mine, tl.full((BLOCK_B, BLOCK_H), 1.0, tl.float32) + late)
        if not FLAG:
            arrive(counter_ptr)
    if late != 0:
        tl.store(late_ptr, 1)


def exchange_constants(programs: int, flag: bool) -> dict[str, Any]:
    """What the kernel is compiled for."""
    width = programs * COLUMNS
    return dict(
        W=width,
        FLAG=flag,
        BLOCK_B=ROWS,
        BLOCK_H=COLUMNS,
        BLOCK_K=min(1024, triton.next_power_of_2(width)),
        SENTINEL=SENTINEL[2],
        INT=INT_TYPE[2][1],
        SPIN_LIMIT=SPINS,
    )


class ExchangeLoop:
    """`programs` programs that exchange (16, 16) bf16 values each, `steps` times.

    one_launch: all steps in one cooperative launch; else (the interpreter) a launch per step.
    """

    def __init__(self, programs: int, steps: int, kind: str, device: torch.device, one_launch: bool) -> None:
        self.programs, self.steps, self.kind, self.one_launch = programs, steps, kind, one_launch
        self.buffer = torch.empty(steps, ROWS, programs * COLUMNS, dtype=torch.bfloat16, device=device)
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)
        self.late = torch.zeros(1, dtype=torch.int32, device=device)

    def prepare(self) -> None:
        fill_with_sentinel(self.buffer)
        self.counter.zero_()

    def run(self) -> None:
        self.prepare()
        arguments = dict(
            buffer_ptr=self.buffer,
            counter_ptr=self.counter,
            late_ptr=self.late,
            **exchange_constants(self.programs, self.kind == "flag"),
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
