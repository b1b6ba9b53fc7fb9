"""Times of a whole layer and of PyTorch's own path, for tuned tables."""

from __future__ import annotations

from collections.abc import Callable

import torch

from triton_lstm.kernels.configs import Clock
from triton_lstm.module import LSTM
from triton_lstm.settings import DTYPES
from triton_lstm.system.machine import provenance
from triton_lstm.tuning.measure import STEPS, _steps, gpu_clock
from triton_lstm.tuning.table_file import LayerTime, Mode


def layer_times(
    dtype: str, hidden_size: int, batch: int, device: torch.device, clock: Clock = gpu_clock, steps: int = STEPS
) -> list[LayerTime]:
    """Times a whole layer with the kernels and with PyTorch's own path; training includes all gradients."""
    steps = _steps(steps, batch, hidden_size)
    times: dict[tuple[Mode, str], float] = {}
    torch_dtype = DTYPES[dtype]
    x = torch.randn(steps, batch, hidden_size, device=device).to(torch_dtype)
    dy = torch.randn_like(x)
    for backend in ("triton", "torch"):
        module = LSTM(hidden_size, hidden_size, backend=backend).to(device, torch_dtype)

        def inference(module: LSTM = module) -> None:
            with torch.no_grad():
                module.eval()(x)

        def training(module: LSTM = module) -> None:
            module.train()(x.requires_grad_())[0].backward(dy)
            module.zero_grad()
            x.grad = None

        calls: dict[Mode, Callable[[], None]] = {"inference": inference, "training": training}
        for mode, call in calls.items():
            times[mode, backend] = clock(call, quantiles=(0.5,))[0] * 1e3 / steps
    modes: tuple[Mode, ...] = ("inference", "training")
    when = provenance()
    return [LayerTime(m, dtype, hidden_size, batch, times[m, "triton"], times[m, "torch"], when) for m in modes]
