"""convert: replaces every nn.LSTM of a model by triton_lstm.LSTM, in place, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from triton_lstm.module import LSTM


@dataclass(frozen=True)
class Report:
    """The result of `convert`. Print it for a summary.

    Names are those of model.named_modules(); a module with several names is listed under the first.

    Attributes:
        converted: names of the modules whose class was changed.
        skipped: names of all other LSTMs of the model, with the reason why they were skipped.
        kind: the class of the converted modules, "triton_lstm.LSTM" or "torch.nn.LSTM".

    Example::

        import torch
        import triton_lstm

        report = triton_lstm.convert(torch.nn.Sequential(torch.nn.LSTM(8, 16)))
        print(report)  # converted 1 of 1 to triton_lstm.LSTM: 0
        assert report.converted == ("0",) and not report.skipped
    """

    converted: tuple[str, ...]
    skipped: dict[str, str]
    kind: str = "triton_lstm.LSTM"

    def __str__(self) -> str:
        total = len(self.converted) + len(self.skipped)
        if not total:
            return "nothing to convert: the model contains no LSTM"
        names = ", ".join(_shown(name) for name in self.converted)
        first = f"converted {len(self.converted)} of {total}{f' to {self.kind}: ' if names else ''}{names}"
        return "\n".join([first, *(f"skipped: {_shown(name)} ({reason})" for name, reason in self.skipped.items())])


def convert(model: nn.Module, *, back: bool = False, **options: Any) -> Report:
    """Converts every torch.nn.LSTM in `model` to triton_lstm.LSTM, in place.

    Only the class of the modules changes. They remain the same objects with the same parameters, so optimizers and
    their state, hooks, shared modules and the train or eval mode remain valid; torch.compile recompiles. Code that
    looks for nn.LSTM by class (isinstance, quantize_dynamic, tools that count layers) no longer finds it: use
    isinstance(m, (nn.LSTM, triton_lstm.LSTM)). Subclasses of nn.LSTM, including parametrized modules, are skipped:
    convert first, then parametrize, shard or script.

    Args:
        model: any module, including an nn.LSTM itself.
        back: convert every triton_lstm.LSTM to nn.LSTM instead. Default: False.
        options: keyword arguments that triton_lstm.LSTM has and nn.LSTM has not, such as `backend=`. They do not apply
            to modules that were converted before.

    Returns:
        A `Report` with the names of the converted modules, and the reasons why others were skipped.

    Raises:
        TypeError: if `model` is not an nn.Module, or an option is unknown, or any is given with back=True.
        ValueError: if the value of an option is invalid. The model is unchanged after any error.

    Example::

        import torch
        import triton_lstm

        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LSTM(16, 32))
        print(triton_lstm.convert(model))  # converted 1 of 1 to triton_lstm.LSTM: 1
        output, (h_n, c_n) = model(torch.randn(5, 2, 8))
        triton_lstm.convert(model, back=True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert expects an nn.Module, got {type(model).__name__}")
    if back and options:
        raise TypeError(f"nn.LSTM does not have these options: {', '.join(options)}. Omit them with back=True")
    unknown = [name for name in options if name not in LSTM.OPTIONS]
    if unknown:
        raise TypeError(f"triton_lstm.LSTM has no option {unknown[0]!r}. Available: {', '.join(LSTM.OPTIONS)}")
    checked = LSTM(1, 1, device="meta", **options)  # runs the constructor's checks
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
    # On a GPU cuDNN requires all weights in one buffer. A sharded weight (DTensor) has no storage that could be moved
    if all(type(weight) in (torch.Tensor, nn.Parameter) for weight in module._flat_weights):
        with torch.inference_mode(False):  # or the weights would become inference tensors permanently
            module.flatten_parameters()


def _is_lstm(module: nn.Module) -> bool:
    return isinstance(module, (nn.LSTM, LSTM)) or _is_scripted(module) or _is_quantized(module)


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) and getattr(module, "original_name", None) == "LSTM"


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__name__ == "LSTM" and type(module).__module__.startswith("torch.ao.")


def _why_not(module: nn.Module, back: bool) -> str | None:
    """Why this LSTM is skipped; None if it is to be converted."""
    old, new = (LSTM, nn.LSTM) if back else (nn.LSTM, LSTM)
    names = {LSTM: "a triton_lstm.LSTM", nn.LSTM: "an nn.LSTM"}
    if isinstance(module, new):
        return f"already {names[new]}"
    if _is_scripted(module):
        return "TorchScript modules cannot be changed: convert first, then script or trace"
    if _is_quantized(module):
        return "quantized, or prepared for quantization"
    if parametrize.is_parametrized(module):
        return "parametrized: convert first, then parametrize"
    if type(module) is not old:
        return (
            f"a subclass, {type(module).__qualname__}, which may behave differently; "
            "if a wrapper created it, convert first, then wrap"
        )
    if "forward" in vars(module):
        return "its forward method was replaced: convert first, then replace it"
    return None
