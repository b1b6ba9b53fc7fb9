"""What a plan needs to know about a GPU, and the known GPUs as data, so that plans can be made without one."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

KIB, MIB = 1 << 10, 1 << 20
_ITEMSIZE = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4, "fp64": 8}


class Device(NamedTuple):
    """A GPU's properties.

    name: as PyTorch reports it. arch: Triton's target, "sm_90" or "gfx942".
    processors: streaming multiprocessors or compute units. shared_bytes: on-chip memory available to one program.
    registers: per processor, 32 bits each. l2_bytes: of the last cache before memory. warp_size: threads.
    """

    name: str
    backend: Literal["cuda", "hip", "interpreter"]
    arch: str
    processors: int
    shared_bytes: int
    registers: int
    l2_bytes: int
    warp_size: int = 32

    def itemsize(self, precision: str) -> int:
        """Bytes per element of the recurrent product on chip.

        "fp32", float32 at full precision, takes two TF32 numbers per element on NVIDIA's tensor cores ("tf32x3").
        Raises ValueError where the GPU does not support the precision.
        """
        if precision == "tf32" and self.backend != "cuda":
            raise ValueError(f"{self.name} has no tf32, which is NVIDIA's")
        twice = precision == "fp32" and self.backend == "cuda"
        return 8 if twice else _ITEMSIZE[precision]


INTERPRETER = Device("Triton's interpreter", "interpreter", "", 1, 1 << 40, 1 << 40, 1 << 40)


def _nvidia(name: str, arch: str, processors: int, shared_kib: int, l2_mib: int) -> Device:
    return Device(name, "cuda", arch, processors, shared_kib * KIB, 65536, l2_mib * MIB)


# From the vendors' white papers and programming guides; an installed GPU is queried instead.
GPUS = {
    "A100": _nvidia("NVIDIA A100-SXM4-80GB", "sm_80", 108, 163, 40),
    "RTX 3090": _nvidia("NVIDIA GeForce RTX 3090", "sm_86", 82, 99, 6),
    "L4": _nvidia("NVIDIA L4", "sm_89", 58, 99, 48),
    "RTX 4090": _nvidia("NVIDIA GeForce RTX 4090", "sm_89", 128, 99, 72),
    "H100": _nvidia("NVIDIA H100 80GB HBM3", "sm_90", 132, 227, 50),
    "H200": _nvidia("NVIDIA H200", "sm_90", 132, 227, 60),
    "B200": _nvidia("NVIDIA B200", "sm_100", 148, 227, 126),
    "RTX 5090": _nvidia("NVIDIA GeForce RTX 5090", "sm_120", 170, 99, 96),
    "MI300X": Device("AMD Instinct MI300X", "hip", "gfx942", 304, 64 * KIB, 131072, 32 * MIB, 64),
}


def known_gpu(name: object) -> Device:
    """A GPU by its short name or PyTorch's, in any case. Raises ValueError for an unknown one."""
    for short, device in GPUS.items():
        if str(name).lower() in (short.lower(), device.name.lower()):
            return device
    raise ValueError(f"there is no {name!r}. There are {', '.join(GPUS)}")


def file_name(gpu: str) -> str:
    """nvidia_h200.json for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"
