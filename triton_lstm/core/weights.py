"""The weights of an nn.RNNBase as a call finds them, and as cuDNN wants them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def weights_of(module: nn.RNNBase) -> list[torch.Tensor]:
    """This call's weights, which RNNBase's own list has afterwards. If they are no plain parameters they are read as
    often as nn.LSTM reads them: a parametrization may be random."""
    if torch.compiler.is_compiling():  # RNNBase's weak references cannot be compiled
        return [getattr(module, name) for name in module._flat_weights_names]
    if not _up_to_date(module):
        module._update_flat_weights()
    weights: Any = module._flat_weights
    return weights


def _up_to_date(module: nn.RNNBase) -> bool:
    """As RNNBase._weights_have_changed, without a function call per weight; False if they are no plain parameters.

    functional_call and load_state_dict(assign=True) change weights without telling RNNBase.
    """
    parameters = module._parameters
    for name, reference in zip(module._flat_weights_names, module._flat_weight_refs, strict=True):
        if name not in parameters or reference is None or reference() is not parameters[name]:
            return False
    return True


def flatten_for_cudnn(module: nn.RNNBase, params: list[torch.Tensor]) -> None:
    """Before PyTorch's own path on a GPU: cuDNN copies weights that do not share one buffer on every call."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return  # the weights have no memory
    if getattr(module, "_is_fsdp_managed_module", False):
        return  # fully_shard gathers them into the same memory at every call
    if not params[0].is_cuda or len({weight.untyped_storage().data_ptr() for weight in params}) == 1:
        return
    jit: Any = torch._C
    tracing = jit._get_tracing_state()
    jit._set_tracing_state(None)  # not part of the trace, which would differ from the next one
    try:
        with torch.inference_mode(False):  # or the weights would become inference tensors permanently
            nn.RNNBase.flatten_parameters(module)
    finally:
        jit._set_tracing_state(tracing)
