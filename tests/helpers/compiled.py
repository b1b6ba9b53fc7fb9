"""Whether the tests' kernels are compiled: on a GPU, or for one that the emulator of tests/ptx stands in for."""

import os

import torch

# PTX_GPU=H100 has all kernels compiled for an H100, and their PTX run on the CPU; PTX_SEED and PTX_WEAK: its schedule
EMULATED = None if torch.cuda.is_available() else os.environ.get("PTX_GPU")
COMPILED = torch.cuda.is_available() or EMULATED is not None
