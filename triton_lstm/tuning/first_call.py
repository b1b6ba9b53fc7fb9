"""The plan for a call; with TRITON_LSTM_AUTOTUNE=1, the first call of a shape tunes it."""

from __future__ import annotations

import logging
import warnings

import torch

from triton_lstm.kernels import device_facts
from triton_lstm.kernels.launch import ForkSafeLock
from triton_lstm.planning.devices import file_name
from triton_lstm.planning.plan import Plan
from triton_lstm.planning.problem import Problem
from triton_lstm.settings import precision_name, wants_tuning
from triton_lstm.system.machine import provenance
from triton_lstm.tuning import tables
from triton_lstm.tuning.choice import Choice, choose, remember
from triton_lstm.tuning.measure import best, measure
from triton_lstm.tuning.table_file import Key, TableError, update

log = logging.getLogger(__name__)
_tuning = ForkSafeLock()
_tried: set[tuple[str, Key]] = set()  # keys that a first call tuned, by GPU; a failure is not repeated


def tune_now(problem: Problem, device: torch.device) -> None:
    """Tunes a problem's key during a call, for this process and, where it is writable, the user's table."""
    facts, key = problem.device, Key.of(problem)
    if (facts.name, key) in _tried:
        return
    with _tuning.lock:
        if (facts.name, key) in _tried:
            return
        _tried.add((facts.name, key))
        log.info("tuning %s for %s", key, facts.name)
        try:
            found = best(key, measure(key, device), provenance())
        except Exception as error:  # the call itself does not depend on it
            warnings.warn(f"{key} could not be tuned, and runs as planned: {error!r}", stacklevel=2)
            return
        if found is None:
            return
        remember(facts.name, found)
        try:
            folder = tables.user_folder()
            if folder is None:
                return
            update(folder / file_name(facts.name), facts.name, found)
        except (OSError, TableError) as error:
            warnings.warn(f"what was tuned is known to this process only: {error}", stacklevel=2)


def plan_for(like: torch.Tensor, batch: int, hidden_size: int, directions: int = 1, *, backward: bool) -> Plan:
    """The plan for a time loop in `like`'s dtype, on its device."""
    return choice_for(like.dtype, like.device, batch, hidden_size, backward, directions).plan


def choice_for(
    dtype: torch.dtype, device: torch.device, batch: int, hidden_size: int, backward: bool, directions: int = 1
) -> Choice:
    """The plan for a layer of this dtype and size, and where it comes from; measured first if so configured."""
    problem = Problem(device_facts(device), precision_name(dtype, device), batch, hidden_size, backward, directions)
    choice = choose(problem)
    if batch and wants_tuning(device) and not choice.exactly(problem):
        tune_now(problem, device)
        choice = choose(problem)
    return choice
