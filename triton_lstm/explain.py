"""explain: what a call will do, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from triton_lstm.backend import chosen_backend
from triton_lstm.cost import cost
from triton_lstm.devices import GPUS, Device
from triton_lstm.module import LSTM
from triton_lstm.table_file import Key
from triton_lstm.tables import Choice, choose, layer_time

_GPU_NAMES = {torch.bfloat16: ("bf16", 2), torch.float16: ("fp16", 2), torch.float32: ("tf32", 4)}


def explain(module: LSTM, input: Any, *, gpu: str | None = None) -> None:
    """Prints what `module(input)` will do and why: kernels or PyTorch's path, configs, and times where they are known.

    Runs nothing. What is printed is of one layer and direction; all of a stack's have one config for each dtype and H.

    Args:
        module: the LSTM.
        input: a tensor or PackedSequence as the module takes it; only its shape, dtype and device are looked at.
        gpu: a name of triton_lstm.devices.GPUS, "H100" say, to ask what the call would do there.

    Raises:
        TypeError: module is no triton_lstm.LSTM, or input no tensor or PackedSequence.
        ValueError: gpu is none of the known ones, or the input does not fit the module.
    """
    print("\n".join(_lines(module, input, gpu)))


def _lines(module: LSTM, input: Any, gpu: str | None) -> list[str]:
    if not isinstance(module, LSTM):
        raise TypeError(f"explain takes a triton_lstm.LSTM, got {type(module).__name__}")
    packed = isinstance(input, PackedSequence)
    data = input.data if packed else input
    if not isinstance(data, torch.Tensor):
        raise TypeError(f"explain takes the module's input, a tensor or PackedSequence, got {type(input).__name__}")
    if gpu is not None and gpu not in GPUS:
        raise ValueError(f"there is no {gpu!r}. There are {', '.join(GPUS)}")
    if data.dim() not in (2, 3) or data.shape[-1] != module.input_size:
        raise ValueError(f"input must be 2-D or 3-D with {module.input_size} features, not {tuple(data.shape)}")
    where = GPUS[gpu].name if gpu else str(data.device)
    dtype = _compute_dtype(data)
    lines = [f"{module}, input {tuple(data.shape)}, {str(dtype).removeprefix('torch.')} on {where}"]
    reason = module._why_not_triton(input) if gpu is None else _why_not_there(module, data, packed)
    if reason:
        return [*lines, f"PyTorch's own LSTM: {reason}"]
    batch = 1 if data.dim() == 2 else data.shape[0 if module.batch_first else 1]
    layers = module.num_layers * (2 if module.bidirectional else 1)
    lines.append(f"Triton kernels, {layers} time loop{'s' if layers > 1 else ''} forward, as many backward; in each:")
    for backward in (False, True):
        device, itemsize, key, choice = _choice(dtype, data.device, batch, module.hidden_size, backward, gpu)
        lines += _of(device, itemsize, key, choice)
    return lines


def _compute_dtype(data: torch.Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(data.device.type) and data.dtype != torch.float64:
        return torch.get_autocast_dtype(data.device.type)
    return data.dtype


def _why_not_there(module: LSTM, data: torch.Tensor, packed: bool) -> str | None:
    if chosen_backend(module.backend) == "torch":
        return "PyTorch's path was asked for"
    if packed:
        return "no kernel for a PackedSequence yet"
    return None if data.dtype in _GPU_NAMES else f"no kernel for {data.dtype} on a GPU"


def _choice(
    dtype: torch.dtype, device: torch.device, batch: int, hidden_size: int, backward: bool, gpu: str | None
) -> tuple[Device, int, Key, Choice]:
    if gpu is not None:
        name, itemsize = _GPU_NAMES[dtype]
        facts = GPUS[gpu]
    else:
        from triton_lstm.kernels import bytes_on_chip, device_facts, precision_name

        facts, itemsize, name = device_facts(device), bytes_on_chip(dtype, device), precision_name(dtype, device)
    key = Key(backward, name, hidden_size, batch)
    return facts, itemsize, key, choose(facts, itemsize, key)


def _of(device: Device, itemsize: int, key: Key, choice: Choice) -> list[str]:
    """A loop's config, where it is from, and what it takes."""
    plan = choice.plan
    lines = [f"{'backward' if key.backward else 'forward'} ({key.dtype}): {plan.describe(key.H)}"]
    if device.backend == "interpreter":
        return [*lines, "  in Triton's interpreter on the CPU: for tests, not for speed"]
    if choice.tuned is None:
        lines.append(f"  planned: no measurement near H={key.H}, B={key.B} is known for {device.name}")
    else:
        of, tuned = "measured" if choice.exactly(key) else "a neighbour's", choice.tuned
        times = f"{tuned.us:.2f} us a step at H={tuned.key.H}, B={tuned.key.B}; {tuned.planned_us:.2f} as planned"
        lines.append(f"  tuned ({of}): {times}")
    if plan.exchange == "flag":
        lines.append(f"  rows are polled {plan.poll_bytes(min(itemsize, 4), key.H, key.backward)} bytes a load")
    lines.append(f"  predicted: {cost(device, itemsize, key.B, key.H, key.backward, plan)}")
    mode = "training" if key.backward else "inference"
    layer = layer_time(device.name, mode, key.dtype, key.H, key.B)
    if layer is not None:
        faster = "faster" if layer.torch_us > layer.triton_us else "SLOWER"
        times = f"{layer.triton_us:.2f} us a step, {faster} than PyTorch's {layer.torch_us:.2f}"
        lines.append(f"  {mode} of a whole layer, measured: {times}")
    return lines
