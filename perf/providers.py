"""The measured implementations: triton_lstm, nn.LSTM on cuDNN, PyTorch's other paths, installed third-party LSTMs."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import triton_lstm
from triton_lstm.core.reference import lstm_reference
from triton_lstm.dispatch import why_torch
from triton_lstm.perf import peers
from triton_lstm.perf.cases import Case
from triton_lstm.perf.results import BASELINE
from triton_lstm.perf.split import SPLIT, in_segments

OURS = "triton_lstm"
STEP_BY_STEP_LIMIT, UNROLLED_LIMIT = 128, 32  # T
NO_RESETS = "has no resets"


@dataclasses.dataclass(frozen=True)
class Provider:
    """An implementation of the LSTM.

    why_not(case, device): None, or the reason why it cannot run the case or is not measured on it.
    make(case, twin): a module with the weights of `twin`, an nn.LSTM; it maps the case's input to
        (output, (h_n, c_n)) or (output, None).
    """

    name: str
    about: str
    why_not: Callable[[Case, torch.device], str | None]
    make: Callable[[Case, nn.LSTM], nn.Module]


class Loop(nn.Module):
    """One layer of nn.LSTM as a plain loop of PyTorch operations, compiled."""

    def __init__(self, case: Case, twin: nn.LSTM) -> None:
        super().__init__()
        self.inner, self.batch_first = twin, case.batch_first
        backend = "inductor" if next(twin.parameters()).is_cuda else "aot_eager"
        torch._dynamo.reset()  # or it would silently run uncompiled after several shapes
        self.run = torch.compile(lstm_reference, backend=backend, dynamic=False, fullgraph=True)

    def forward(self, x: torch.Tensor) -> Any:
        x = x.transpose(0, 1) if self.batch_first else x
        state = x.new_zeros(x.shape[1], self.inner.hidden_size)
        weights = [getattr(self.inner, name) for name in self.inner._flat_weights_names]
        y, h_n, c_n = self.run(x, state, state, *weights)
        return y.transpose(0, 1) if self.batch_first else y, (h_n[None], c_n[None])


class StepByStep(nn.Module):
    """nn.LSTM with cuDNN disabled."""

    def __init__(self, case: Case, twin: nn.LSTM) -> None:
        super().__init__()
        self.inner = twin

    def forward(self, x: torch.Tensor | PackedSequence) -> Any:
        with torch.backends.cudnn.flags(enabled=False, allow_tf32=torch.backends.cudnn.allow_tf32):
            return self.inner(x)


class WithResets(nn.Module):
    """This library's LSTM, called with the case's resets."""

    def __init__(self, case: Case, inner: triton_lstm.LSTM) -> None:
        super().__init__()
        self.inner = inner
        self.resets: torch.Tensor
        self.register_buffer("resets", case.reset_rows().to(next(inner.parameters()).device))

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x, resets=self.resets)


def _baseline(case: Case, twin: nn.LSTM) -> nn.Module:
    twin.flatten_parameters()
    return in_segments(case, twin)


def _ours(case: Case, twin: nn.LSTM, **kwargs: Any) -> nn.Module:
    module = triton_lstm.LSTM(**case.module_arguments, backend="triton", **kwargs)
    weight = next(twin.parameters())
    module.to(weight.device, weight.dtype).load_state_dict(twin.state_dict())
    return module if case.resets is None else WithResets(case, module)


def _why_not_ours(case: Case, device: torch.device) -> str | None:
    why = why_torch(case.dtype, device, "auto")
    return None if why is None else str(why)


def _why_not_step_by_step(case: Case, device: torch.device) -> str | None:
    if case.resets is not None:
        return NO_RESETS
    if case.T > STEP_BY_STEP_LIMIT:
        return f"several launches per step: measured up to T={STEP_BY_STEP_LIMIT} only"
    return None


def _why_not_loop(case: Case, device: torch.device) -> str | None:
    if case.T > UNROLLED_LIMIT:
        return f"torch.compile unrolls every step: measured up to T={UNROLLED_LIMIT} only"
    return _plain_only(case, resets=False)


def _plain_only(case: Case, *, resets: bool) -> str | None:
    if case.resets is not None and not resets:
        return NO_RESETS
    plain = case.layers == 1 and not (case.bidirectional or case.proj_size or case.packed)
    return None if plain else "one layer and direction only, no projection, no packed input"


def _peer(
    name: str, package: str, about: str, make: Any, precisions: tuple[str, ...], *, resets: bool = False
) -> Provider:
    def why_not(case: Case, device: torch.device) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        if case.precision not in precisions:
            return f"does not support {case.precision}"
        return _plain_only(case, resets=resets) or ("needs a GPU" if device.type != "cuda" else None)

    return Provider(name, about, why_not, make)


_LIST = (
    Provider(OURS, "this library", _why_not_ours, _ours),
    Provider(
        "triton_lstm recompute",
        "this library, recomputing the gates in the backward pass",
        _why_not_ours,
        lambda case, twin: _ours(case, twin, recompute=True),
    ),
    Provider(
        BASELINE,
        f"torch.nn.LSTM, on cuDNN where PyTorch uses it; where a case has resets, {SPLIT}",
        lambda case, device: None,
        _baseline,
    ),
    Provider("step by step", "torch.nn.LSTM, cuDNN disabled", _why_not_step_by_step, StepByStep),
    Provider("torch.compile", "a plain loop over the steps, compiled", _why_not_loop, Loop),
    _peer("TorchRL", "torchrl", "torchrl's lstm_triton, unchanged", peers.TorchRL, ("fp32", "tf32"), resets=True),
    _peer("FlashRNN", "flashrnn", "flashrnn's cuda_fused, after a linear layer", peers.FlashRNN, ("fp16", "bf16")),
    _peer("haste", "haste_pytorch", "haste_pytorch.LSTM", peers.Haste, ("fp32", "tf32")),
)
PROVIDERS = {provider.name: provider for provider in _LIST}


def make(provider: Provider, case: Case, twin: nn.LSTM) -> nn.Module:
    """The provider's module with its own copy of `twin`'s weights."""
    return provider.make(case, copy.deepcopy(twin))
