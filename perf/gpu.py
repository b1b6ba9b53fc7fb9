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
    from triton_lstm.kernels import device_facts, lstm_backward, lstm_forward
    from triton_lstm.plan import make_plan

    device, T = torch.device("cuda", 0), 32
    torch.manual_seed(0)
    options: Any = dict(device=device, dtype=DTYPES[dtype])
    xg, w_hh = torch.randn(T, B, 4 * H, **options), torch.randn(4 * H, H, **options) / H**0.5
    h0, c0 = torch.randn(B, H, **options), torch.randn(B, H, device=device)
    dy = torch.randn(T, B, H, **options)
    plans = []
    for backward in (False, True):
        plan = make_plan(device_facts(device), DTYPES[dtype].itemsize, B, H, backward)
        if plan.exchange == "none":  # small enough for one program; two and more are what is to be tried
            plan = dataclasses.replace(plan, block_h=16, block_k=64, groups=1, warps=4)
        plans.append(dataclasses.replace(plan, exchange=kind))

    def forward(plan: Any) -> tuple[Any, ...]:
        gates = xg.clone()
        y, c, c_all = lstm_forward(gates, w_hh, h0, c0, plan=plan, reverse=False, save=True)
        return y, c, c_all, gates

    def step_by_step(plan: Any) -> Any:
        return dataclasses.replace(plan, one_launch=False)

    y, c, c_all, gates = forward(step_by_step(plans[0]))
    saved = (w_hh, c0, gates, c_all)
    expected = lstm_backward(dy, None, None, *saved, plan=step_by_step(plans[1]), reverse=False)
    wrong = torch.zeros(2, dtype=torch.int64, device=device)
    busy, other = torch.randn(4096, 4096, **options), torch.cuda.Stream()
    for k in tqdm(range(launches), desc=f"{kind} {dtype} B={B} H={H}", leave=False):
        if k % 8 == 0:
            with torch.cuda.stream(other):
                torch.mm(busy, busy)
        got = forward(plans[0])
        wrong[0] += torch.stack([(a != b).any() for a, b in zip(got, (y, c, c_all, gates), strict=True)]).any()
        got = lstm_backward(dy, None, None, *saved, plan=plans[1], reverse=False)
        wrong[1] += torch.stack([(a != b).any() for a, b in zip(got, expected, strict=True)]).any()
    programs = [plan.grid(H)[0] * plan.grid(H)[1] for plan in plans]
    row = dict(exchange=kind, dtype=dtype, B=B, H=H, launches=launches, programs=programs[0])
    return row | dict(backward_programs=programs[1], wrong_forward=int(wrong[0]), wrong_backward=int(wrong[1]))


def stress() -> Iterator[dict[str, Any]]:
    for kind in ("flag", "barrier"):
        for case in STRESS:
            yield stress_case(kind, *case)


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
        error = {m: (m(x)[0] - reference).abs().max().item() for m in (ours, theirs)}
    for name, module in (("triton_lstm", ours), ("nn.LSTM", theirs)):
        row = dict(provider=name, dtype=dtype, B=B, H=H, T=TIMES_T, max_error=error[module])
        if module is ours and not error[ours] <= 2 * error[theirs] + torch.finfo(x.dtype).eps:
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
    for case in tqdm(TIMES, desc="times"):
        try:
            yield from times_case(*case)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            dtype, B, H = case
            yield dict(dtype=dtype, B=B, H=H, T=TIMES_T, failed=str(error).splitlines()[-1][:120])


def main() -> int:
    import pandas as pd

    parser = argparse.ArgumentParser(prog="python -m triton_lstm.perf.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["stress", "times", "folder"])
    parser.add_argument("--out", type=Path, help="folder of the CSV (default: perf/results/<gpu>)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU that PyTorch can use was found; nothing was measured.", file=sys.stderr)
        return 2
    folder = args.out or results_folder()
    if args.what == "folder":
        print(folder)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in stress() if args.what == "stress" else times():
        rows.append(row | machine())
        pd.DataFrame(rows).to_csv(folder / f"{args.what}.csv", index=False)  # after every row: nothing measured is lost
    frame = pd.DataFrame(rows)
    print(frame.drop(columns=list(machine())).to_string(index=False))
    print(f"{machine()}; written to {folder / args.what}.csv")
    wrong = frame.get("wrong_forward", 0) + frame.get("wrong_backward", 0) if args.what == "stress" else 0
    failed = frame["failed"].notna().any() if "failed" in frame else False
    return int(bool(failed) or bool((pd.Series(wrong) > 0).any()))


if __name__ == "__main__":
    sys.exit(main())
