"""The run of a suite: floors first, then per case a correctness check and all modes, the providers taking turns."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import torch

from triton_lstm.perf import floor
from triton_lstm.perf.cases import MODES, Case
from triton_lstm.perf.check import Check, make_problem
from triton_lstm.perf.clock import timing
from triton_lstm.perf.cudnn import algorithm_name
from triton_lstm.perf.failures import DeviceLostError, device_still_there, failure
from triton_lstm.perf.measure import TURNS, Runner
from triton_lstm.perf.providers import OURS, PROVIDERS, Provider, make
from triton_lstm.perf.results import ALL_MODES, BASELINE, DEVICE, describe
from triton_lstm.perf.store import Store
from triton_lstm.perf.warm import compile_all, jobs_of_bench
from triton_lstm.perf.work import Floors, floor_ms
from triton_lstm.settings import UsageError, switches
from triton_lstm.system.machine import clock_mhz
from triton_lstm.system.terminal import Bar

Wanted = tuple[Case, Provider, str]


def run(wanted: Sequence[Wanted], results: Store, device: torch.device) -> None:
    """Measures everything that is not in `results` yet; every row is saved immediately.

    Raises DeviceLostError after an error that makes the GPU unusable for this process; the failure is recorded.
    Raises UsageError if it is unusable from the start.
    """
    try:
        device_still_there(device)
    except DeviceLostError as error:
        raise UsageError(f"the GPU is unusable ({error}); nothing was measured") from None
    cases: dict[str, list[Wanted]] = {}
    for item in wanted:
        cases.setdefault(item[0].name, []).append(item)
    floors_wanted = floor.floor_names(device)
    with Bar(total=len(floors_wanted) + len(wanted), unit="row", smoothing=0.05) as bar:
        bar.set_description("compiling")
        missing_floors = [name for name in floors_wanted if not results.has(name, DEVICE, floor.MODE)]
        jobs = jobs_of_bench(calls_of_ours(wanted, results, device), missing_floors)
        if device.type == "cuda" and len(jobs) > 2:
            compile_all(jobs)
        for name in floors_wanted:
            bar.set_description(name)
            if name in missing_floors:
                _measure_floor(name, results, device)
            bar.update()
        floors = floor.floors_of(results.frame(), device)
        for name, items in cases.items():
            bar.set_description(name)
            missing = [item for item in items if not _done(item, results, device)]
            if missing:
                _CaseRun(missing, results, floors, device).run(bar)
            bar.update(len(items) - len(missing))


def calls_of_ours(wanted: Sequence[Wanted], results: Store, device: torch.device) -> list[tuple[Case, str]]:
    """The cases still to be measured with a provider that uses our kernels, and its name."""
    ours = [item for item in wanted if item[1].name.startswith(OURS) and not _done(item, results, device)]
    return list(dict.fromkeys((case, provider.name) for case, provider, _ in ours))


def _done(item: Wanted, results: Store, device: torch.device) -> bool:
    case, provider, mode = item
    row = results.get(case.name, provider.name, mode)
    if row is None:
        return False
    if row["mode"] == ALL_MODES and row["status"] == "skipped" and provider.why_not(case, device) is None:
        results.measure_again(row)  # the reason for skipping it no longer applies
        return False
    return True


def _measure_floor(name: str, results: Store, device: torch.device) -> None:
    row: dict[str, Any] = {"case": name, "provider": DEVICE, "mode": floor.MODE}
    results.begin(row)
    try:
        row = floor.measure_floor(name, device)
    except (Exception, SystemExit) as error:
        row |= failure(error)
    results.end()
    results.add(row)
    device_still_there(device)


class _CaseRun:
    """The missing measurements of one case."""

    def __init__(self, wanted: Sequence[Wanted], results: Store, floors: Floors, device: torch.device) -> None:
        self.case = wanted[0][0]
        self.modes = list(dict.fromkeys(mode for _, _, mode in wanted))
        self.providers = list({provider.name: provider for _, provider, _ in wanted}.values())
        self.wanted = {(provider.name, mode) for _, provider, mode in wanted}
        self.results, self.floors, self.device = results, floors, device
        self.errors: dict[str, dict[str, Any]] = {}
        self.clock = math.nan

    def run(self, bar: Any) -> None:
        with switches(self.case.precision), timing(self.device), _quiet():
            runners = self._runners(bar)
            for mode in self.modes:
                self._measure(mode, [r for r in runners if (r.provider, mode) in self.wanted], bar)
        del runners
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _row(self, provider: str, mode: str) -> dict[str, Any]:
        row = describe(self.case, provider, mode, floor_ms(self.case, mode, self.floors))
        return row | ({"algorithm": algorithm_name(self.case, mode)} if provider == BASELINE else {})

    def _add_unmeasured(self, outcomes: dict[str, dict[str, Any]], bar: Any) -> None:
        """Adds one row, for all modes, per provider that has no time on this case."""
        if not outcomes:
            return
        self.results.add(*(self._row(provider, ALL_MODES) | outcome for provider, outcome in outcomes.items()))
        for provider, outcome in outcomes.items():
            self._report(provider, outcome, bar)
        bar.update(sum(provider in outcomes for provider, _ in self.wanted))

    def _report(self, what: str, outcome: dict[str, Any], bar: Any) -> None:
        if outcome["status"] != "skipped":
            with contextlib.suppress(OSError):  # the output was closed; the row is on disk
                bar.write(f"{self.case.name}, {what}: {outcome['status']} ({outcome['reason']})")

    def _runners(self, bar: Any) -> list[Runner]:
        """The providers that support the case and are correct on it."""
        reasons = {provider.name: provider.why_not(self.case, self.device) for provider in self.providers}
        able = [provider for provider in self.providers if reasons[provider.name] is None]
        self._add_unmeasured({name: {"status": "skipped", "reason": why} for name, why in reasons.items() if why}, bar)
        if not able:
            return []
        self.results.begin(*(self._row(provider.name, ALL_MODES) for provider in able))
        try:
            problem = make_problem(self.case, self.device)
            check = Check(problem)
        except (Exception, SystemExit) as error:
            outcome = failure(error)
            outcome |= {"status": "unchecked", "reason": f"nothing to compare with: {outcome['reason']}"}
            self._add_unmeasured({provider.name: outcome for provider in able}, bar)
            self.results.end()
            device_still_there(self.device)
            return []
        runners = []
        for provider in able:
            self.results.begin(self._row(provider.name, ALL_MODES))
            try:
                module = make(provider, self.case, problem.twin)
                outcome = check(module)
            except (Exception, SystemExit) as error:
                outcome = failure(error)
            if "status" in outcome:
                self._add_unmeasured({provider.name: outcome}, bar)
                device_still_there(self.device)
            else:
                self.errors[provider.name] = outcome
                runners.append(Runner(problem, module, provider.name))
        self.results.end()
        return runners

    def _measure(self, mode: str, runners: list[Runner], bar: Any) -> None:
        times: dict[str, list[float]] = {runner.provider: [] for runner in runners}
        turns: dict[str, Any] = {}
        peaks: dict[str, float] = {}
        for k in range(1 if MODES[mode].timer == "cold" else TURNS):
            first = k % max(1, len(runners))  # the first one gets the coolest device, at the lowest clock
            for runner in runners[first:] + runners[:first]:
                name = runner.provider
                if name not in times:
                    continue
                self.results.begin(self._row(name, mode))
                try:
                    if name not in turns:
                        turns[name] = runner.turn(mode)
                        peaks[name] = runner.peak_mb(mode)
                    times[name] += turns[name]()
                except (Exception, SystemExit) as error:
                    del times[name]
                    outcome = failure(error)
                    self.results.add(self._row(name, mode) | outcome)
                    self._report(f"{name}, {mode}", outcome, bar)
                    bar.update()
                    device_still_there(self.device)
                    if MODES[mode].timer == "graph" and outcome["status"] != "skipped":
                        # A failed capture leaves the process's random generator and allocator in an invalid state
                        raise DeviceLostError(f"{name} could not be captured as a CUDA graph") from None
        self.results.end()
        self._note_clock([runner for runner in runners if runner.provider in times])
        rows = []
        for name, values in times.items():
            p20, ms, p80 = pd.Series(values).quantile([0.2, 0.5, 0.8])
            measured = {"status": "ok", "ms": ms, "p20": p20, "p80": p80, "runs": len(values)}
            about = {"peak_mb": peaks[name], "clock_mhz": self.clock}
            rows.append(self._row(name, mode) | self.errors[name] | measured | about)
        if rows:
            self.results.add(*rows)
        bar.update(len(rows))

    def _note_clock(self, runners: list[Runner]) -> None:
        """Reads the clock once per case, under load: the query takes a while, and an idle device clocks down."""
        if self.device.type == "cuda" and runners and math.isnan(self.clock):
            with contextlib.suppress(RuntimeError):  # informative only
                for _ in range(50):
                    runners[0].inference()
                self.clock = clock_mhz()
                torch.cuda.synchronize()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Sends warnings to the log, each once, since they would break the progress bar."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)


def all_combinations(cases: Sequence[Case]) -> list[Wanted]:
    """All providers on all modes of `cases`."""
    return [(case, provider, mode) for case in cases for provider in PROVIDERS.values() for mode in case.modes]
