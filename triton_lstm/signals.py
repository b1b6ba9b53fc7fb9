"""Ctrl-C, SIGTERM and SIGHUP, which all mean the same to a command. Nothing heavy is imported here."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

INTERRUPTED = 130  # the exit status


def _heard() -> list[int]:
    """Those of the three that this process was not started to ignore, as under nohup or in a script's background."""
    if threading.current_thread() is not threading.main_thread():
        return []
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]


@contextlib.contextmanager
def _handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in _heard()}
    try:
        yield
    finally:
        for number, shipped in before.items():
            signal.signal(number, shipped)


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Inside the block each of the three raises KeyboardInterrupt."""

    def interrupt(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    with _handled(interrupt):
        yield


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Inside the block they only fill the list, so that what is under way ends; a second Ctrl-C is not put off."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)

    with _handled(note):
        yield seen


def leave_quietly() -> None:
    """Ends a command that is interrupted before it begins, while PyTorch is being imported, without a traceback.

    For the process of a command only; in any other that imports this package, Ctrl-C stays what it is.
    """
    started = sys.argv[0] if getattr(sys, "argv", None) else ""  # "-m" while python looks for the module to run
    ours = started == "-m" and any(word in ("triton_lstm", "-mtriton_lstm") for word in sys.orig_argv)
    if (ours or Path(started).stem == "triton-lstm") and signal.SIGINT in _heard():
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
