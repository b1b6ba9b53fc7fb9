"""The cuDNN algorithm that PyTorch chooses for nn.LSTM on an NVIDIA GPU.

Derived from get_algo in aten/src/ATen/native/cudnn/RNN.cpp and use_cudnn in aten/src/ATen/native/RNN.cpp, PyTorch 2.13.
"""

from __future__ import annotations

from typing import Literal

import torch

from triton_lstm.perf.cases import MODES, Case

Algorithm = Literal["STANDARD", "PERSIST_STATIC", "PERSIST_STATIC_SMALL_H"]


def algorithm(case: Case, capability: tuple[int, int], processors: int, *, forward: bool) -> Algorithm:
    """The algorithm that PyTorch requests. capability, processors (SMs): of at::cuda::getCurrentDeviceProperties."""
    if case.proj_size or case.packed or case.resets:
        return "STANDARD"
    small = 192 if forward else 128
    if case.precision != "fp64" and capability >= (6, 0) and case.H <= small:
        return "PERSIST_STATIC_SMALL_H"
    shape = case.layers == 1 and case.H <= 1024 and not case.bidirectional and case.H % 128 == 0 and case.I % 128 == 0
    if case.precision == "fp16" and shape and _persistent_device(case, capability, processors):
        return "PERSIST_STATIC"
    return "STANDARD"


def _persistent_device(case: Case, capability: tuple[int, int], processors: int) -> bool:
    major, minor = capability
    if major == 7:
        if minor == 5:
            return False
        rows = (case.B % 16 == 0 and case.B not in (80, 112)) or case.B == 8
        steps = (case.T >= 40 and case.B <= 128) or (case.T >= 20 and case.B <= 96) or (case.T >= 10 and case.B <= 32)
        return rows and steps
    return major >= 8 and processors >= 98 and minor != 6 and case.B % 8 == 0 and case.B <= 128


def takes_bf16(torch_version: str, cudnn_version: int | None, capability: tuple[int, int]) -> bool:
    """Whether PyTorch uses cuDNN for bf16, and not its own step-by-step path.

    Since PyTorch 2.10 (pull request 164411), if built with cuDNN >= 9.13 and on compute capability 8.0 or higher.
    """
    release = tuple(int(part) for part in torch_version.split(".")[:2])
    return release >= (2, 10) and (cudnn_version or 0) >= 91300 and capability >= (8, 0)


def algorithm_name(case: Case, mode: str) -> str:
    """The algorithm of nn.LSTM for `case`, for a table: "PERSIST_STATIC", or "SMALL_H / STANDARD" if the passes differ.

    "step by step" is PyTorch's own path without cuDNN; "CPU" and "MIOpen" are used without an NVIDIA GPU; "copies
    weights" if PyTorch does not flatten them for cuDNN, which then does so on every call (bf16, in PyTorch 2.13);
    "split" if sequences are split at resets.
    """
    if not torch.cuda.is_available():
        return "CPU"
    if torch.version.hip:
        return "MIOpen"
    capability = torch.cuda.get_device_capability()
    processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    if case.precision == "bf16" and not takes_bf16(torch.__version__, torch.backends.cudnn.version(), capability):
        return "step by step"
    forward_name, backward_name = (
        algorithm(case, capability, processors, forward=forward).removeprefix("PERSIST_STATIC_")
        for forward in (True, False)
    )
    passes = MODES[mode] if mode in MODES else MODES["forward_backward"]
    names = [forward_name] * passes.forward + [backward_name] * passes.backward
    copies = "" if case.dtype in torch.backends.cudnn.CUDNN_TENSOR_DTYPES else ", copies weights"
    return " / ".join(dict.fromkeys(names)) + copies + ", split" * bool(case.resets)
