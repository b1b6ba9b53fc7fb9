"""`python -m triton_lstm.cli.warm` precompiles the kernels for bench suites and for shapes to tune."""

from __future__ import annotations

import argparse
import sys

import torch

from triton_lstm.cli.tune import add_shapes, keys_of
from triton_lstm.perf import floor
from triton_lstm.perf.cases import SUITES
from triton_lstm.perf.providers import OURS, PROVIDERS
from triton_lstm.perf.warm import compile_all, jobs_of_bench, jobs_of_tune
from triton_lstm.settings import device_for


def main() -> int:
    """Exit status 0, or 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m triton_lstm.cli.warm", description="Precompiles kernels.")
    parser.add_argument("--suite", action="append", choices=list(SUITES), default=[], help="a suite of bench")
    add_shapes(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("PyTorch found no usable GPU; nothing was compiled.", file=sys.stderr)
        return 2
    cases = {case.name: case for suite in args.suite for case in SUITES[suite]()}.values()
    ours = [name for name in PROVIDERS if name.startswith(OURS)]
    jobs = jobs_of_tune(keys_of(args))
    jobs |= jobs_of_bench([(case, who) for case in cases for who in ours], floor.floor_names(device_for()))
    print(f"precompiled: {compile_all(jobs)} of {len(jobs)} loops and cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
