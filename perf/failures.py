"""The consequences of an error in a run: a row with the reason, and whether this process can continue."""

from __future__ import annotations

import gc
import logging
import traceback
from typing import Any

import torch

from triton_lstm.perf.measure import UnsupportedModeError

log = logging.getLogger(__name__)


class DeviceLostError(Exception):
    """This process can no longer use the GPU; a new one can continue."""


def failure(error: BaseException) -> dict[str, Any]:
    """The columns `status` and `reason` of a row that could not be measured because of an error."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:
        lines = []
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]
    reason = "".join(c if c.isprintable() else "?" for c in text)
    if isinstance(error, UnsupportedModeError):
        return {"status": "skipped", "reason": str(error)}
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        traceback.clear_frames(error.__traceback__)  # the frames keep tensors alive
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {"status": "out of memory", "reason": reason}
    log.error("%s", reason, exc_info=error)
    return {"status": "failed", "reason": reason}


def device_still_there(device: torch.device) -> None:
    """Raises DeviceLostError if an earlier error, such as an illegal access, has made the GPU unusable."""
    if device.type != "cuda":
        return
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError as error:
        raise DeviceLostError(str(error).splitlines()[0]) from None
