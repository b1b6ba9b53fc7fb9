"""`python -m triton_lstm.perf.cold CASE PROVIDER`: the time of a process's first forward and backward, as JSON.

Imports, the device's context and the data are there before the clock starts; what is compiled or loaded is in the time.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from triton_lstm.backend import device_for


def main() -> None:
    device = device_for()  # before the first import of a kernel
    from triton_lstm.perf.cases import SUITES, switches
    from triton_lstm.perf.check import draw
    from triton_lstm.perf.measure import Runner
    from triton_lstm.perf.providers import PROVIDERS, make

    name, provider = sys.argv[1:]
    case = next(case for suite in SUITES.values() for case in suite() if case.name == name)
    with switches(case.precision):
        problem = draw(case, device)
        runner = Runner(problem, make(PROVIDERS[provider], case, problem.twin), provider)
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        (runner.dy @ runner.dy.new_ones(runner.dy.shape[-1], 1)).sum()  # the matrix library's own start is everybody's
        wait()
        begin = time.perf_counter()
        runner.both()
        wait()
    print(json.dumps({"ms": (time.perf_counter() - begin) * 1e3}))


if __name__ == "__main__":
    main()
