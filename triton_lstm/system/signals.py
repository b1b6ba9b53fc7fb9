"""Ctrl-C, SIGTERM and SIGHUP, which a command handles alike."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn


def _not_ignored() -> list[int]:
    """Those of the three that this process does not ignore, as it would under nohup or in a script's background."""
    if threading.current_thread() is not threading.main_thread():
        return []
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]


@contextlib.contextmanager
def _handled(handler: Callable[[int, Any], None] | signal.Handlers) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in _not_ignored()}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)


@contextlib.contextmanager
def signals_end_process() -> Iterator[None]:
    """Inside the block each of the three ends the process at once, also while it waits outside of Python."""
    with _handled(signal.SIG_DFL):
        yield


@contextlib.contextmanager
def signals_raise_interrupt() -> Iterator[None]:
    """Inside the block each of the three raises KeyboardInterrupt."""

    def interrupt(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    with _handled(interrupt):
        yield


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Inside the block the three are only appended to the list; a second Ctrl-C raises KeyboardInterrupt.

    Not under torchrun, which sends Ctrl-C again to the processes that have it from the terminal, and kills after a
    while those that do not end.
    """
    received: list[int] = []
    once = "TORCHELASTIC_RUN_ID" in os.environ

    def defer(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT and not once:
            raise KeyboardInterrupt
        received.append(number)

    with _handled(defer):
        yield received
