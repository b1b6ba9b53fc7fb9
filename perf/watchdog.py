"""Recovery from a measurement that hangs or loses the GPU: both need a new process."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from triton_lstm.settings import UsageError
from triton_lstm.system.terminal import escaped

HANG_S = 300  # a measurement takes seconds


@contextlib.contextmanager
def watched(marker: Path, alarm: Callable[[], None], interval: float = 5.0) -> Iterator[None]:
    """Calls `alarm` once `marker`, which is touched before every measurement, has been unchanged for HANG_S."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(interval):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - marker.stat().st_mtime > HANG_S:
                    alarm()
                    return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def start_again(command: Sequence[str] | None, why: str) -> NoReturn:
    """Replaces this process by a new `python -m triton_lstm` with the arguments `command`.

    command: None if the process is not the command's own, as in a test: raises UsageError.
    """
    if command is None:
        raise UsageError(f"{why}. The same command in a fresh process resumes from here")
    print(f"{escaped(why)}; continuing in a fresh one", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "triton_lstm", *command])
