"""Precompiles kernels in parallel, in processes that share Triton's on-disk cache."""

from __future__ import annotations

import dataclasses
import functools
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait

from triton_lstm.perf import floor
from triton_lstm.perf.cases import Case
from triton_lstm.perf.check import make_problem
from triton_lstm.perf.measure import Runner
from triton_lstm.perf.providers import OURS, PROVIDERS, make
from triton_lstm.settings import device_for, switches
from triton_lstm.tuning.table_file import Key

log = logging.getLogger(__name__)
Job = Callable[[], None]  # picklable
STEPS = 2  # kernels are not specialized to the number of steps
LIMIT_S = 180
PROCESSES = 16  # at most


def compile_case(case: Case, provider: str = OURS) -> None:
    """One short inference and training call of one of our providers, with the case's batch and sizes."""
    device = device_for()
    if PROVIDERS[provider].why_not(case, device) is not None:
        return
    short = dataclasses.replace(case, T=STEPS)
    with switches(case.precision):
        problem = make_problem(short, device)
        runner = Runner(problem, make(PROVIDERS[provider], short, problem.twin), provider)
        runner.inference()
        runner.both()


def compile_floor(name: str) -> None:
    """The kernels behind one of the device's floors."""
    floor.STEPS = STEPS  # in this process, which measures nothing
    floor.measure_floor(name, device_for())


def compile_loop(key: Key) -> None:
    """The kernels that `tune` will measure for a key."""
    device = device_for()  # before the first import of a kernel
    from triton_lstm.tuning.measure import compile_ahead

    with switches(key.dtype):
        compile_ahead(key, device)


def jobs_of_bench(calls: Sequence[tuple[Case, str]], floors: Sequence[str]) -> dict[str, Job]:
    """By name: calls of our providers on cases, and floors, of which only the exchange has a kernel."""
    jobs: dict[str, Job] = {f"{case.name}, {who}": functools.partial(compile_case, case, who) for case, who in calls}
    exchanges = [name for name in floors if name.startswith("exchange")]
    return jobs | {name: functools.partial(compile_floor, name) for name in exchanges}


def jobs_of_tune(keys: Sequence[Key]) -> dict[str, Job]:
    return {str(key): functools.partial(compile_loop, key) for key in keys}


def compile_all(jobs: Mapping[str, Job], workers: int | None = None) -> int:
    """The number of jobs that succeeded. Those that fail or take too long are left to the run, which records them."""
    count = workers or max(1, min(PROCESSES, os.cpu_count() or 2, len(jobs)))
    ignore = (signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=spawn, initializer=signal.signal, initargs=ignore)
    futures = {pool.submit(job): name for name, job in jobs.items()}
    try:
        done, late = wait(futures, timeout=LIMIT_S)
        for future in done:
            if future.exception() is not None:
                log.error("%s was not precompiled", futures[future], exc_info=future.exception())
        for future in late:
            log.error("%s was not precompiled within %s s", futures[future], LIMIT_S)
        return sum(future.exception() is None for future in done)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():  # one that hangs would hold the GPU
            process.terminate()
            process.join(10)
