"""GPUs that nobody sells, for plans in a corner."""

from triton_lstm.devices import Device


def small_gpu(processors: int, shared_bytes: int) -> Device:
    return Device("small", "cuda", "sm_86", processors, shared_bytes, 65536, 1 << 21)


SMALL_GPU = small_gpu(6, 65536)  # a laptop's: programs that wait for each other must be few
