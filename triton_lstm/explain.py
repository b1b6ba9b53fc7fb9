"""explain: what a call will do, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from triton_lstm.backend import chosen_backend, layer_dtype, precision_name, wants_gradient, why_torch_is_faster
from triton_lstm.cost import cost
from triton_lstm.devices import Device, known_gpu
from triton_lstm.module import LSTM
from triton_lstm.table_file import Key
from triton_lstm.tables import Choice, choose, layer_time
from triton_lstm.terminal import say


def explain(module: LSTM, input: Any, hx: Any = None, *, gpu: str | None = None) -> None:
    """Prints what `module(input)` will do and why: kernels or PyTorch's path, configs, and times where they are known.

    Runs nothing. What is printed is of one layer and direction; all of a stack have the same.

    Args:
        module: the LSTM.
        input: a tensor or PackedSequence as the module takes it; only its shape, dtype and device are looked at.
        hx: not looked at; there so that a call can be pasted.
        gpu: "H100", say, to ask what the call would do there: see triton_lstm.devices.GPUS.

    Raises:
        TypeError: module is no triton_lstm.LSTM, or input no tensor or PackedSequence.
        ValueError: gpu is none of the known ones, or the input does not fit the module.
    """
    for line in _lines(module, input, None if gpu is None else known_gpu(gpu)):
        say(line, indent="    ")


def _lines(module: LSTM, input: Any, there: Device | None) -> list[str]:
    if not isinstance(module, LSTM):
        kind = f"{type(module).__module__.removesuffix('.modules.rnn')}.{type(module).__qualname__}"
        raise TypeError(f"explain takes a triton_lstm.LSTM, got {kind}")
    data = input.data if isinstance(input, PackedSequence) else input
    if not isinstance(data, torch.Tensor):
        raise TypeError(f"explain takes the module's input, a tensor or PackedSequence, got {type(input).__name__}")
    if data.dim() not in (2, 3) or data.shape[-1] != module.input_size or 0 in data.shape:
        raise ValueError(f"input must be 2-D or 3-D with {module.input_size} features, not {tuple(data.shape)}")
    dtype, weight = _compute_dtype(data, there), module.weight_hh_l0
    if dtype == data.dtype != weight.dtype:
        raise ValueError(f"input has dtype {data.dtype}, the module's weights {weight.dtype}. Convert one of them")
    where = there.name if there else str(data.device)
    lines = [f"{module}, input {tuple(data.shape)}, {str(dtype).removeprefix('torch.')} on {where}"]
    batch = _batch(module, input)
    reason = _why_not(module, input, data, batch, there)
    if reason:
        lines.append(reason if reason.startswith("an error") else f"PyTorch's own LSTM: {reason}")
        if there is None and data.device.type == "cpu":
            lines.append('Off a GPU, gpu="H100" asks what the call would do on one.')
        return lines
    computed = layer_dtype(dtype, module.proj_size > 0)
    if computed != dtype:
        lines.append(
            "The layers compute in float32: with a projection W_hh @ W_hr may be larger than float16 can hold."
        )
    layers = module.num_layers * (2 if module.bidirectional else 1)
    lines.append(f"Triton kernels, {layers} time loop{'s' if layers > 1 else ''} in each direction of time:")
    for backward in (False, True) if wants_gradient(data, *module.parameters()) else (False,):
        directions = 2 if module.bidirectional else 1
        lines += _of(
            *_choice(computed, data.device, batch, module.hidden_size, backward, directions, there), directions
        )
    return lines


def _batch(module: LSTM, input: Any) -> int:
    if isinstance(input, PackedSequence):
        return int(input.batch_sizes[0])
    return 1 if input.dim() == 2 else int(input.shape[0 if module.batch_first else 1])


def _compute_dtype(data: torch.Tensor, there: Device | None) -> torch.dtype:
    """Autocast's where one is on: of a GPU or, asked from a laptop, of the CPU."""
    for kind in ("cuda", data.device.type) if there else (data.device.type,):
        if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) and data.dtype != torch.float64:
            return torch.get_autocast_dtype(kind)
    return data.dtype


def _why_not(module: LSTM, input: Any, data: torch.Tensor, batch: int, there: Device | None) -> str | None:
    """The reason for PyTorch's path, as the call itself would have it, or as it would be on another machine."""
    try:
        if there is None:
            return module._why_not_triton(data, module._params, kernels_only=isinstance(input, PackedSequence))
        if chosen_backend(module.backend) == "torch":
            return "PyTorch's path was asked for"
        reason = None
        if data.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            reason = f"no kernel for {data.dtype} on a GPU"
        if reason and chosen_backend(module.backend) == "triton":
            return f'an error, since backend="triton" was asked for: {reason}'
        # a call under autocast takes the kernels, and so do packed rows
        if reason or isinstance(input, PackedSequence) or _compute_dtype(data, there) != data.dtype:
            return reason
        return why_torch_is_faster(there.name, data, module.backend, batch, module._params, module.bias)
    except RuntimeError as error:
        return f"an error: {error}"


def _choice(
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    hidden_size: int,
    backward: bool,
    directions: int,
    there: Device | None,
) -> tuple[Device, Key, Choice]:
    if there is None:
        from triton_lstm.kernels import device_facts

    facts = there or device_facts(device)
    precision = precision_name(dtype, torch.device("cuda") if there else device)
    if facts.backend == "hip" and precision == "tf32":
        precision = "fp32"
    key = Key(backward, precision, hidden_size, batch)
    return facts, key, choose(facts, key, directions)


def _of(device: Device, key: Key, choice: Choice, directions: int) -> list[str]:
    """A loop's config, where it is from, and what it takes."""
    plan, itemsize = choice.plan, device.itemsize(key.dtype)
    lines = [f"{'backward' if key.backward else 'forward'} ({key.dtype}): {plan.describe(key.H)}"]
    if device.backend == "interpreter":
        return [*lines, "  in Triton's interpreter on the CPU: for tests, not for speed"]
    if choice.tuned is None:
        lines.append(f"  planned: nothing near H={key.H}, B={key.B} is measured; `triton-lstm tune` does that")
    else:
        of, tuned = "measured" if choice.exactly(key) else "a neighbour's", choice.tuned
        before = f", {tuned.planned_us:.2f} as planned" if tuned.planned_us else ""
        times = f"{tuned.us:.2f} us a step at H={tuned.key.H}, B={tuned.key.B}{before}"
        lines.append(f"  tuned ({of}): {times}; {tuned.measured}")
    if plan.exchange == "flag":
        lines.append(f"  rows are polled {plan.poll_bytes(min(itemsize, 4), key.H, key.backward)} bytes a load")
    beside = directions if plan.beside(device, itemsize, key.H, key.backward) else 1
    if directions == 2:
        lines.append(
            f"  {'both directions of time in one launch' if beside == 2 else 'one direction of time after the other'}"
        )
    lines.append(f"  predicted: {cost(device, itemsize, key.B, key.H, key.backward, plan, beside)}")
    mode = "training" if key.backward else "inference"
    layer = layer_time(device.name, mode, key.dtype, key.H, key.B)
    if layer is not None:
        faster = "faster" if layer.torch_us > layer.triton_us else "SLOWER"
        times = f"{layer.triton_us:.2f} us a step, {faster} than PyTorch's {layer.torch_us:.2f}"
        lines.append(f"  {mode} of a whole layer, measured: {times}")
    return lines
