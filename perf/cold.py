"""`python -m triton_lstm.perf.cold CASE PROVIDER`: the time of a process's first forward and backward, as JSON.

Excludes imports, the device's context and the data; includes everything that is compiled or loaded.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from triton_lstm.settings import device_for, switches


def main() -> None:
    device = device_for()  # before the first import of a kernel
    from triton_lstm.perf.cases import SUITES
    from triton_lstm.perf.check import make_problem
    from triton_lstm.perf.measure import Runner
    from triton_lstm.perf.providers import PROVIDERS, make

    name, provider = sys.argv[1:]
    case = next(case for suite in SUITES.values() for case in suite() if case.name == name)
    with switches(case.precision):
        problem = make_problem(case, device)
        runner = Runner(problem, make(PROVIDERS[provider], case, problem.twin), provider)
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        (
            runner.dy @ runner.dy.new_ones(runner.dy.shape[-1], 1)
        ).sum()  # initializes the BLAS library, which every provider uses
        wait()
        begin = time.perf_counter()
        runner.both()
        wait()
    print(json.dumps({"ms": (time.perf_counter() - begin) * 1e3}))


if __name__ == "__main__":
    main()
