"""What only a GPU can tell: `python -m triton_lstm.perf.gpu stress | times`; `make gpu` runs both, and the tests.

stress  Thousands of one-launch runs of both exchanges, another stream busy, each compared bit by bit with a run that
        launches every step by itself and so needs no exchange.
times   Medians of triton.testing.do_bench, ours and nn.LSTM in turn, forward and forward + backward.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# dtype, B, H, launches: grids from two programs to the whole device, aligned rows and not
STRESS = [
    ("bf16", 3, 33, 4000),
    ("bf16", 16, 256, 4000),
    ("bf16", 16, 768, 3000),
    ("fp16", 64, 1024, 2000),
    ("bf16", 17, 650, 2000),
    ("fp32", 16, 768, 2000),
]
TIMES = [(dtype, B, H) for dtype in DTYPES for B in (16, 64) for H in (128, 256, 512, 768, 1024)]
TIMES_T = 512


def machine() -> dict[str, Any]:
    """What a number depends on besides the code."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "tf32": torch.backends.cudnn.allow_tf32,
    }


def results_folder() -> Path:
    """perf/results/<gpu>, made of the GPU's name."""
    name = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")
    return Path(__file__).resolve().parent / "results" / name


def stress_case(kind: Any, dtype: str, B: int, H: int, launches: int) -> dict[str, Any]:
    """One exchange on one shape: how many of the launches, forward and backward, gave other bits."""
    from triton_lstm.autograd import plan_for
    from triton_lstm.kernels import lstm_backward, lstm_forward

    device, T = torch.device("cuda", 0), 32
    torch.manual_seed(0)
    options: Any = dict(device=device, dtype=DTYPES[dtype])
    xg, w_hh = torch.randn(T, B, 4 * H, **options), torch.randn(4 * H, H, **options) / H**0.5
    h0, c0 = torch.randn(B, H, **options), torch.randn(B, H, device=device)
    dy = torch.randn(T, B, H, **options)
    plans = []
    for reverse_time in (False, True):
        plan = plan_for(xg, backward=reverse_time)
        if plan.exchange == "none":  # small enough for one program; two and more are what is to be tried
            plan = dataclasses.replace(plan, block_h=16, block_k=64, groups=1, warps=4)
        if not plan.one_launch:
            raise RuntimeError(f"this device is too small to hold all programs at once: {plan}")
        plans.append(dataclasses.replace(plan, exchange=kind))

    def forward(plan: Any) -> tuple[Any, ...]:
        gates = xg.clone()
        y, c, c_all = lstm_forward(gates, w_hh, h0, c0, plan=plan, reverse=False, save=True)
        return y, c, c_all, gates

    def backward(plan: Any) -> tuple[Any, ...]:
        return lstm_backward(dy, None, None, *saved, plan=plan, reverse=False)

    def step_by_step(plan: Any) -> Any:
        return dataclasses.replace(plan, one_launch=False)

    expected = forward(step_by_step(plans[0]))
    saved = (w_hh, c0, expected[3], expected[2])
    expected_backward = backward(step_by_step(plans[1]))
    wrong = torch.zeros(2, dtype=torch.int64, device=device)
    busy, other = torch.randn(4096, 4096, **options), torch.cuda.Stream()
    for k in tqdm(range(launches), desc=f"{kind} {dtype} B={B} H={H}", leave=False):
        if k % 8 == 0:
            with torch.cuda.stream(other):
                torch.mm(busy, busy)
        wrong[0] += _differ(forward(plans[0]), expected)
        wrong[1] += _differ(backward(plans[1]), expected_backward)
    programs = [plan.grid(H)[0] * plan.grid(H)[1] for plan in plans]
    row = dict(exchange=kind, dtype=dtype, B=B, H=H, launches=launches, programs=programs[0])
    return row | dict(backward_programs=programs[1], wrong=int(wrong.sum()), wrong_backward=int(wrong[1]))


def _differ(got: tuple[Any, ...], expected: tuple[Any, ...]) -> torch.Tensor:
    return torch.stack([(a != b).any() for a, b in zip(got, expected, strict=True)]).any()


def stress() -> Iterator[dict[str, Any]]:
    # A refused launch or a plan that does not fit would silently compare step by step with itself
    warnings.simplefilter("error")
    for kind in ("flag", "barrier"):
        for dtype, B, H, launches in STRESS:
            try:
                yield stress_case(kind, dtype, B, H, launches)
            except Exception as error:  # a failure on one shape must not lose the others
                yield dict(exchange=kind, dtype=dtype, B=B, H=H, failed=repr(error)[:200])


def times_case(dtype: str, B: int, H: int) -> Iterator[dict[str, Any]]:
    """Rows for ours and nn.LSTM on one shape. No time is given for an output that is wrong."""
    from triton.testing import do_bench

    from triton_lstm import LSTM

    torch.manual_seed(0)
    theirs = nn.LSTM(H, H).to("cuda", DTYPES[dtype])
    ours = LSTM(H, H, backend="triton").to("cuda", DTYPES[dtype])
    ours.load_state_dict(theirs.state_dict())
    exact = nn.LSTM(H, H).to("cuda", torch.float64)
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(TIMES_T, B, H, device="cuda", dtype=DTYPES[dtype], requires_grad=True)
    dy = torch.randn_like(x)
    with torch.no_grad():
        reference = exact(x.double())[0]
        eps = 2**-10 if dtype == "fp32" and torch.backends.cudnn.allow_tf32 else torch.finfo(x.dtype).eps
        error = {m: (m(x)[0] - reference).abs().max().item() for m in (ours, theirs)}
    for name, module in (("triton_lstm", ours), ("nn.LSTM", theirs)):
        row = dict(provider=name, dtype=dtype, B=B, H=H, T=TIMES_T, max_error=error[module])
        if module is ours and not error[ours] <= 2 * error[theirs] + eps:
            yield row | dict(failed="wrong")
            continue

        def forward(module: nn.Module = module) -> None:
            with torch.no_grad():
                module(x)

        def both(module: nn.Module = module) -> None:
            module(x)[0].backward(dy)

        leaves = [x, *module.parameters()]
        row["forward_us_per_step"] = do_bench(forward, return_mode="median") * 1e3 / TIMES_T
        row["both_us_per_step"] = do_bench(both, grad_to_none=leaves, return_mode="median") * 1e3 / TIMES_T
        yield row


def times() -> Iterator[dict[str, Any]]:
    for dtype, B, H in tqdm(TIMES, desc="times"):
        try:
            yield from times_case(dtype, B, H)
        except Exception as error:  # a failure on one shape must not lose the others
            yield dict(dtype=dtype, B=B, H=H, T=TIMES_T, failed=repr(error)[:200])


def main() -> int:
    import pandas as pd

    parser = argparse.ArgumentParser(prog="python -m triton_lstm.perf.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["stress", "times"])
    parser.add_argument("--out", type=Path, help="folder of the CSV (default: perf/results/<gpu>)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU that PyTorch can use was found; nothing was measured.", file=sys.stderr)
        return 2
    folder, about = args.out or results_folder(), machine()
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in stress() if args.what == "stress" else times():
        rows.append(row)
        # After every row, so that nothing measured is lost
        pd.DataFrame(rows).assign(**about).to_csv(folder / f"{args.what}.csv", index=False)
    frame = pd.DataFrame(rows)
    print(frame.to_string(index=False))
    print(f"{about}; written to {folder / args.what}.csv")
    return int(any(row.get("failed") or row.get("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
