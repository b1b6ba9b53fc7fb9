"""Compiles the kernels of many cases side by side, in processes that share Triton's cache on disk."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait

from triton_lstm.backend import device_for
from triton_lstm.perf import floor
from triton_lstm.perf.cases import Case, switches
from triton_lstm.perf.check import draw
from triton_lstm.perf.measure import Runner
from triton_lstm.perf.providers import OURS, PROVIDERS, make

log = logging.getLogger(__name__)
STEPS = 2  # no kernel is compiled for a number of steps
LIMIT_S = 180


def compile_case(case: Case) -> None:
    """One short inference and training call of triton_lstm, on the case's own batch and sizes."""
    device = device_for()
    if PROVIDERS[OURS].why_not(case, device) is not None:
        return
    short = dataclasses.replace(case, T=STEPS)
    with switches(case.precision):
        problem = draw(short, device)
        runner = Runner(problem, make(PROVIDERS[OURS], short, problem.twin), OURS)
        runner.inference()
        runner.both()


def compile_floor(name: str) -> None:
    """The kernels behind one of the device's floors."""
    floor.STEPS = STEPS  # of this process, which measures nothing
    floor.measure_floor(name, device_for())


def compile_all(cases: Sequence[Case], floors: Sequence[str], workers: int | None = None) -> None:
    """What fails or takes too long here is left to the run itself, which records it."""
    exchanges = [name for name in floors if name.startswith("exchange")]
    count = workers or max(1, min(8, (os.cpu_count() or 2) // 2, len(cases) + len(exchanges)))
    quiet = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is this process's to answer
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=spawn, initializer=signal.signal, initargs=quiet)
    futures = {pool.submit(compile_case, case): case.name for case in cases}
    futures |= {pool.submit(compile_floor, name): name for name in exchanges}
    try:
        done, late = wait(futures, timeout=LIMIT_S)
        for future in done:
            if future.exception() is not None:
                log.error("%s was not compiled ahead", futures[future], exc_info=future.exception())
        for future in late:
            log.error("%s was not compiled ahead within %s s", futures[future], LIMIT_S)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():  # one that hangs would hold the GPU
            process.terminate()
            process.join(10)
