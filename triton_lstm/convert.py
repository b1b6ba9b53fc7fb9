"""convert: every nn.LSTM of a model to triton_lstm.LSTM, in place, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from triton_lstm.module import LSTM


@dataclass(frozen=True)
class Report:
    """What `convert` did. Names are those of named_modules(); a module with several names is listed under its first.

    converted: the modules that changed their class.
    skipped: every other LSTM of the model, and why it was left as it is.
    kind: the class they have now.
    """

    converted: tuple[str, ...]
    skipped: dict[str, str]
    kind: str = "triton_lstm.LSTM"

    def __str__(self) -> str:
        total = len(self.converted) + len(self.skipped)
        if not total:
            return "nothing to convert: the model has no LSTM"
        names = ", ".join(_shown(name) for name in self.converted)
        first = f"converted {len(self.converted)} of {total}{f' to {self.kind}: ' if names else ''}{names}"
        return "\n".join([first, *(f"left: {_shown(name)} ({reason})" for name, reason in self.skipped.items())])


def convert(model: nn.Module, *, back: bool = False, **options: Any) -> Report:
    """Makes every torch.nn.LSTM in `model` a triton_lstm.LSTM, in place.

    The modules stay the same objects with the same parameters and change their class only: optimizers and their states,
    hooks, modules used in two places and train or eval mode all stay valid; torch.compile compiles anew. What asks for
    nn.LSTM by its class finds none any more: isinstance, quantize_dynamic, tools that count or check layers. Ask
    isinstance(m, (nn.LSTM, triton_lstm.LSTM)). Subclasses are left alone, parametrized
    modules among them: convert first, then parametrize, shard or script.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.LSTM(16, 32))
    >>> print(triton_lstm.convert(model))
    converted 1 of 1 to triton_lstm.LSTM: 1

    Args:
        model: any module, also an nn.LSTM itself.
        back: make every triton_lstm.LSTM an nn.LSTM instead, without a trace of what it was.
        options: triton_lstm.LSTM's own arguments, `backend=` for one. Modules converted earlier keep theirs.

    Returns:
        Which modules were converted, and why the others were not; print it.

    Raises:
        TypeError: model is no nn.Module; an option that triton_lstm.LSTM does not have, or any with back=True.
        ValueError: an option's value that triton_lstm.LSTM refuses. The model is as it was after any error.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes a model, an nn.Module, got {type(model).__name__}")
    if back and options:
        raise TypeError(f"nn.LSTM has none of these options: {', '.join(options)}. Leave them out with back=True")
    unknown = [name for name in options if name not in LSTM.OPTIONS]
    if unknown:
        raise TypeError(f"triton_lstm.LSTM has no option {unknown[0]!r}. It has: {', '.join(LSTM.OPTIONS)}")
    checked = LSTM(1, 1, device="meta", **options)  # the constructor's checks
    values = {name: getattr(checked, name) for name in LSTM.OPTIONS}

    found = {name: (module, _why_not(module, back)) for name, module in model.named_modules() if _is_lstm(module)}
    skipped = {name: reason for name, (_, reason) in found.items() if reason is not None}
    converted = {name: module for name, (module, reason) in found.items() if reason is None}
    for module in converted.values():
        if back:
            _to_pytorch(module)
        else:
            module.__class__ = LSTM
            vars(module).update(values)
    return Report(tuple(converted), skipped, "torch.nn.LSTM" if back else "triton_lstm.LSTM")


def _shown(name: str) -> str:
    return name or "(the model itself)"


def _to_pytorch(module: Any) -> None:
    module.__class__ = nn.LSTM
    for name in LSTM.OPTIONS:
        vars(module).pop(name, None)
    # On a GPU cuDNN wants all weights in one buffer. A sharded weight (DTensor) is no memory of its own to move
    if all(type(weight) in (torch.Tensor, nn.Parameter) for weight in module._flat_weights):
        with torch.inference_mode(False):  # or the weights would become inference tensors for good
            module.flatten_parameters()


def _is_lstm(module: nn.Module) -> bool:
    return isinstance(module, (nn.LSTM, LSTM)) or _is_scripted(module) or _is_quantized(module)


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) and getattr(module, "original_name", None) == "LSTM"


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__name__ == "LSTM" and type(module).__module__.startswith("torch.ao.")


def _why_not(module: nn.Module, back: bool) -> str | None:
    """Why this LSTM is left as it is; None if it is to be converted."""
    old, new = (LSTM, nn.LSTM) if back else (nn.LSTM, LSTM)
    names = {LSTM: "a triton_lstm.LSTM", nn.LSTM: "an nn.LSTM"}
    if isinstance(module, new):
        return f"already {names[new]}"
    if _is_scripted(module):
        return "TorchScript is fixed once it is made: convert first, then script or trace"
    if _is_quantized(module):
        return "quantized, or made for quantization"
    if parametrize.is_parametrized(module):
        return "parametrized: convert first, then parametrize"
    if type(module) is not old:
        return (
            f"a subclass, {type(module).__qualname__}, that may do something of its own; "
            "where a wrapper made it, convert first, then wrap"
        )
    if "forward" in vars(module):
        return "its forward was replaced by another one: convert first, then replace it"
    return None
