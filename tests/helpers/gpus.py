"""GPUs that nobody sells, for plans in a corner, and problems on any."""

from triton_lstm.planning.devices import Device
from triton_lstm.planning.problem import Problem


def small_gpu(processors: int, shared_bytes: int) -> Device:
    return Device("small", "cuda", "sm_86", processors, shared_bytes, 65536, 1 << 21)


SMALL_GPU = small_gpu(6, 65536)  # a laptop's: programs that wait for each other must be few


def problem_of(device: Device, itemsize: int, B: int, H: int, backward: bool, directions: int = 1) -> Problem:
    """A problem whose elements take so many bytes on chip."""
    precision = ({4: "tf32", 8: "fp32"} if device.backend == "cuda" else {4: "fp32", 8: "fp64"}).get(itemsize, "bf16")
    return Problem(device, precision, B, H, backward, directions)
