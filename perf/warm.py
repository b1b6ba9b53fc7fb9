"""Compiles kernels ahead and side by side, in processes that share Triton's cache on disk.

`python -m triton_lstm.perf.warm` does it for suites of bench and the shapes of tune, while the tests run, say.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait

import torch

from triton_lstm.backend import device_for
from triton_lstm.perf import floor
from triton_lstm.perf.cases import SUITES, Case, switches
from triton_lstm.perf.check import draw
from triton_lstm.perf.measure import Runner
from triton_lstm.perf.providers import OURS, PROVIDERS, make
from triton_lstm.table_file import Key

log = logging.getLogger(__name__)
Job = Callable[[], None]  # that another process can be given
STEPS = 2  # no kernel is compiled for a number of steps
LIMIT_S = 180
PROCESSES = 16  # at most


def compile_case(case: Case, provider: str = OURS) -> None:
    """One short inference and training call of one of ours, on the case's own batch and sizes."""
    device = device_for()
    if PROVIDERS[provider].why_not(case, device) is not None:
        return
    short = dataclasses.replace(case, T=STEPS)
    with switches(case.precision):
        problem = draw(short, device)
        runner = Runner(problem, make(PROVIDERS[provider], short, problem.twin), provider)
        runner.inference()
        runner.both()


def compile_floor(name: str) -> None:
    """The kernels behind one of the device's floors."""
    floor.STEPS = STEPS  # of this process, which measures nothing
    floor.measure_floor(name, device_for())


def compile_loop(key: Key) -> None:
    """What tune will measure for a key."""
    device = device_for()  # before the first import of a kernel
    from triton_lstm.tune import compile_ahead

    with switches(key.dtype):
        compile_ahead(key, device)


def jobs_of_bench(calls: Sequence[tuple[Case, str]], floors: Sequence[str]) -> dict[str, Job]:
    """By name: calls of a provider of ours on a case, and floors, of which only the exchange has a kernel."""
    jobs: dict[str, Job] = {f"{case.name}, {who}": functools.partial(compile_case, case, who) for case, who in calls}
    exchanges = [name for name in floors if name.startswith("exchange")]
    return jobs | {name: functools.partial(compile_floor, name) for name in exchanges}


def jobs_of_tune(keys: Sequence[Key]) -> dict[str, Job]:
    return {str(key): functools.partial(compile_loop, key) for key in keys}


def compile_all(jobs: Mapping[str, Job], workers: int | None = None) -> int:
    """How many of the jobs were done. What fails or takes too long is left to the run itself, which records it."""
    count = workers or max(1, min(PROCESSES, os.cpu_count() or 2, len(jobs)))
    quiet = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is this process's to answer
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=spawn, initializer=signal.signal, initargs=quiet)
    futures = {pool.submit(job): name for name, job in jobs.items()}
    try:
        done, late = wait(futures, timeout=LIMIT_S)
        for future in done:
            if future.exception() is not None:
                log.error("%s was not compiled ahead", futures[future], exc_info=future.exception())
        for future in late:
            log.error("%s was not compiled ahead within %s s", futures[future], LIMIT_S)
        return sum(future.exception() is None for future in done)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():  # one that hangs would hold the GPU
            process.terminate()
            process.join(10)


def main() -> int:
    """0; 2 without a GPU."""
    from triton_lstm.tune_commands import add_shapes, keys_of

    parser = argparse.ArgumentParser(prog="python -m triton_lstm.perf.warm", description="Compiles kernels ahead.")
    parser.add_argument("--suite", action="append", choices=list(SUITES), default=[], help="of bench")
    add_shapes(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU that PyTorch can use was found; nothing was compiled.", file=sys.stderr)
        return 2
    cases = {case.name: case for suite in args.suite for case in SUITES[suite]()}.values()
    ours = [name for name in PROVIDERS if name.startswith(OURS)]
    jobs = jobs_of_tune(keys_of(args))
    jobs |= jobs_of_bench([(case, who) for case in cases for who in ours], floor.floor_names(device_for()))
    print(f"compiled ahead: {compile_all(jobs)} of {len(jobs)} loops and cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
