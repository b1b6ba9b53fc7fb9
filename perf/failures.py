"""What an error means for a run: a row that says so, and whether this process can go on."""

from __future__ import annotations

import gc
import logging
import traceback
from typing import Any

import torch

from triton_lstm.perf.measure import NotHereError

log = logging.getLogger(__name__)


class DeviceLostError(Exception):
    """The GPU takes no more work from this process; a fresh one can go on."""


def failure(error: BaseException) -> dict[str, Any]:
    """The columns `status` and `reason` of a row that an error stands in the way of."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:
        lines = []
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]
    reason = "".join(c if c.isprintable() else "?" for c in text)
    if isinstance(error, NotHereError):
        return {"status": "skipped", "reason": str(error)}
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        traceback.clear_frames(error.__traceback__)  # they hold what was allocated
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {"status": "out of memory", "reason": reason}
    log.error("%s", reason, exc_info=error)
    return {"status": "failed", "reason": reason}


def device_still_there(device: torch.device) -> None:
    """Raises DeviceLostError where an error before, an illegal access say, has ended the process's use of the GPU."""
    if device.type != "cuda":
        return
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError as error:
        raise DeviceLostError(str(error).splitlines()[0]) from None
