"""Ctrl-C, SIGTERM and SIGHUP, which all mean the same to a command."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn


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
