"""How much memory a device has."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

# The limits of a container, of both versions of Linux's control groups
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_of(device: torch.device) -> int:
    """All bytes of a GPU, or of this machine or the container that this process is in, used ones included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            found.append(int(Path(path).read_text()))
    return min(found)
