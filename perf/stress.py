"""Stress test of both exchanges: `python -m triton_lstm.perf.stress`, on a GPU.

Thousands of one-launch runs while another stream is busy, each compared bitwise with a run that launches every step
separately and so needs no exchange; sums that programs split, which are added in another order, with their first run.
With --small a few launches of tiny shapes, for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from triton_lstm.core.packing import starts_and_lengths
from triton_lstm.planning.problem import Problem
from triton_lstm.planning.space import candidates
from triton_lstm.settings import DTYPES
from triton_lstm.system.terminal import Bar

# precision, B, H, launches, variant: grids from two programs to the whole device, aligned rows and not
STRESS = [
    ("bf16", 3, 33, 4000, ""),
    ("bf16", 16, 256, 4000, ""),
    ("bf16", 16, 768, 3000, ""),
    ("fp16", 64, 1024, 2000, ""),
    ("bf16", 17, 650, 2000, ""),
    ("tf32", 16, 768, 2000, ""),
    ("bf16", 16, 512, 2000, "both directions"),
    ("bf16", 64, 768, 2000, "packed"),
    ("bf16", 64, 1024, 2000, "split sums"),
    ("tf32", 64, 512, 2000, "split sums"),
]
SMALL = [("bf16", 3, 33, 1, ""), ("fp16", 17, 64, 1, ""), ("tf32", 2, 48, 1, "")]
SMALL += [("bf16", 17, 48, 1, "both directions"), ("bf16", 17, 48, 1, "packed"), ("bf16", 17, 64, 1, "split sums")]


class NoSplitError(Exception):
    """A device whose plans split no sums of a shape."""


def stress_case(
    kind: Any, precision: str, B: int, H: int, launches: int, variant: str = "", *, T: int, device: torch.device
) -> dict[str, Any]:
    """One exchange on one shape: how many of the launches, forward and backward, gave different bits.

    variant: "both directions" of time at once, "packed" rows of different lengths, backward "split sums", or none.
    """
    from triton_lstm.kernels import device_facts, lstm_backward, lstm_forward
    from triton_lstm.tuning.first_call import plan_for

    torch.manual_seed(0)
    options: Any = dict(device=device, dtype=DTYPES[precision])
    D = 2 if variant == "both directions" else 1
    rows: tuple[int, ...] = T, B
    packed: tuple[Any, Any] = None, None
    h0 = None
    if variant == "packed":
        batch_sizes = torch.linspace(B, 1, T).long()
        packed, rows = starts_and_lengths(batch_sizes, device), (int(batch_sizes.sum()),)
    else:
        h0 = torch.randn(D, B, H, **options)
    xg, w_hh = torch.randn(*rows, D * 4 * H, **options), torch.randn(D * 4 * H, H, **options) / H**0.5
    c0, dy = torch.randn(D, B, H, device=device), torch.randn(*rows, D * H, **options)
    plans = []
    for reverse_time in (False, True):
        plan = plan_for(xg, B, H, D, backward=reverse_time)
        if kind != "none" and plan.exchange == "none":  # the test needs two programs or more
            plan = dataclasses.replace(plan, block_h=16, block_k=64, groups=1, warps=4)
        if kind != "none" and not plan.one_launch:
            raise RuntimeError(f"this device is too small to hold all programs at once: {plan}")
        if reverse_time and variant == "split sums" and kind != "none":
            plan = _split(plan, Problem(device_facts(device), precision, B, H, True))
        plans.append(plan if kind == "none" else dataclasses.replace(plan, exchange=kind))

    def forward(plan: Any) -> tuple[Any, ...]:
        gates = xg.clone()
        y, _, c, c_all = lstm_forward(gates, w_hh, h0, c0, *packed, plan=plan, save_gates=True, save_c=True)
        return y, c, c_all, gates

    def backward(plan: Any) -> tuple[Any, ...]:
        return lstm_backward(dy, None, None, *saved, *packed, plan=plan)

    def step_by_step(plan: Any) -> Any:
        return dataclasses.replace(plan, one_launch=False)

    expected = forward(step_by_step(plans[0]))
    saved = (w_hh, c0, expected[3], expected[2])
    expected_backward = backward(step_by_step(plans[1]))
    wrong = torch.zeros(2, dtype=torch.int64, device=device)
    if plans[1].splits > 1:  # step by step no sum is split, so it is added in another order
        split = backward(plans[1])
        wrong[1] += _far(split, expected_backward, 2**-10 if precision == "tf32" else torch.finfo(xg.dtype).eps)
        expected_backward = split
    keep_busy = _other_stream(device)
    for k in Bar(range(launches), desc=f"{kind} {precision} B={B} H={H}", leave=False):
        if k % 8 == 0:
            keep_busy()
        wrong[0] += _differ(forward(plans[0]), expected)
        wrong[1] += _differ(backward(plans[1]), expected_backward)
    programs = [plan.grid(H)[0] * plan.grid(H)[1] for plan in plans]
    row = dict(exchange=kind, precision=precision, variant=variant, B=B, H=H, launches=launches, programs=programs[0])
    return row | dict(backward_programs=programs[1], wrong_forward=int(wrong[0]), wrong_backward=int(wrong[1]))


def _other_stream(device: torch.device) -> Callable[[], None]:
    """A function that queues work on another stream of the GPU; a no-op without one."""
    if device.type != "cuda":
        return lambda: None
    busy, other = torch.randn(4096, 4096, device=device), torch.cuda.Stream(device)

    def multiply() -> None:
        with torch.cuda.stream(other):
            torch.mm(busy, busy)

    return multiply


def _split(plan: Any, problem: Problem) -> Any:
    """A plan whose programs split their sums. Raises NoSplitError where the device has none."""
    if problem.device.backend == "interpreter":
        return dataclasses.replace(plan, block_h=2 * plan.block_h, splits=2)
    for candidate in candidates(problem):
        if candidate.splits > 1:
            return candidate
    raise NoSplitError("this device cannot split these sums")


def _far(got: tuple[Any, ...], expected: tuple[Any, ...], eps: float) -> torch.Tensor:
    """Whether a norm differs by more than 8 units in the last place of the products' operands."""
    errors = [(a - b).double().norm() / b.double().norm() for a, b in zip(got, expected, strict=True)]
    return ~(torch.stack(errors).max() <= 8 * eps)  # NaN is far


def _differ(got: tuple[Any, ...], expected: tuple[Any, ...]) -> torch.Tensor:
    return torch.stack([(a != b).any() for a, b in zip(got, expected, strict=True)]).any()


def stress(small: bool) -> Iterator[dict[str, Any]]:
    device = torch.device("cuda", 0)
    # After a refused launch or with a plan that does not fit, step by step would silently be compared with itself
    warnings.simplefilter("error")
    for kind in ("none", "flag", "barrier") if small else ("flag", "barrier"):
        for precision, B, H, launches, variant in SMALL if small else STRESS:
            try:
                yield stress_case(kind, precision, B, H, launches, variant, T=4 if small else 32, device=device)
            except NoSplitError as reason:
                yield dict(exchange=kind, precision=precision, variant=variant, B=B, H=H, skipped=str(reason))
            except Exception as error:  # a failure on one shape must not stop the others
                yield dict(exchange=kind, precision=precision, variant=variant, B=B, H=H, failed=repr(error)[:200])


def main() -> int:
    """Exit status 0, 1 if a launch failed or gave different bits, or 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m triton_lstm.perf.stress", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few launches of tiny shapes, for compute-sanitizer")
    parser.add_argument("--out", type=Path, metavar="CSV", help="default: perf/results/<gpu>/stress.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("PyTorch found no usable GPU; nothing was measured.", file=sys.stderr)
        return 2
    import pandas as pd

    from triton_lstm.perf.results import write
    from triton_lstm.perf.store import results_folder
    from triton_lstm.system.machine import machine, now

    path = args.out or results_folder() / "stress.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for row in stress(args.small):
        rows.append(row | machine() | {"date": now()})
        write(pd.DataFrame(rows), path)  # after every row, so that none is lost
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    return int(any(row.get("failed") or row.get("wrong_forward") or row.get("wrong_backward") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
