"""explain: what a call will do, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from triton_lstm.core.checks import check_cu_seqlens, check_documents, check_resets
from triton_lstm.core.weights import weights_of
from triton_lstm.dispatch import decide_for
from triton_lstm.module import LSTM
from triton_lstm.planning.cost import cost
from triton_lstm.planning.devices import Device, known_gpu
from triton_lstm.planning.limits import directions_at_once
from triton_lstm.planning.plan import Plan
from triton_lstm.planning.problem import Problem
from triton_lstm.settings import layer_dtype, precision_name, wants_gradient
from triton_lstm.system.terminal import say
from triton_lstm.tuning.choice import choose, layer_time

Model = Callable[[Problem, Plan], str]


def explain(
    module: LSTM,
    input: Any,
    hx: Any = None,
    *,
    resets: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,
    gpu: str | None = None,
    model: Model | None = None,
) -> None:
    """Prints what `module(input)` will do and why: kernels or PyTorch's path, configs, and times where they are known.

    Runs nothing. The printed plan and times are per layer and direction of time; all layers of a stack share them.

    Args:
        module: the LSTM.
        input: (T, B, I), (B, T, I) if batch_first, (T, I) unbatched, or a PackedSequence; only its shape, dtype and
            device matter.
        hx: ignored; accepted so that a call's arguments can be pasted.
        resets, cu_seqlens: the call's. Documents that are known on the CPU are the batch of the plan.
        gpu: the name of another GPU to explain the call for, such as "H100": see triton_lstm.planning.devices.GPUS.
        model: says what a plan's step should take, besides the prediction. `triton_lstm.perf.step.compiled.in_words`
            compiles each kernel for that, which takes seconds, so it has to be asked for.

    Raises:
        TypeError: module is not a triton_lstm.LSTM, or input is neither a tensor nor a PackedSequence.
        ValueError: gpu is unknown, or the input does not fit the module.

    Example::

        import torch
        import triton_lstm

        module = triton_lstm.LSTM(512, 768, dtype=torch.bfloat16)
        triton_lstm.explain(module, torch.empty(100, 64, 512, dtype=torch.bfloat16), gpu="H100")
    """
    there = None if gpu is None else known_gpu(gpu)
    for line in _lines(module, input, resets, cu_seqlens, there, model):
        say(line, indent="    ")


def _documents(cu_seqlens: Any, resets: Any, steps: int, batch: int) -> int:
    """How many documents a call runs side by side; 0: it has resets for them. Raises as the call does."""
    if resets is not None:
        raise ValueError("cu_seqlens goes with a batch of one sequence, and not with resets")
    cu_seqlens = check_cu_seqlens(cu_seqlens, batch)
    if cu_seqlens.device.type != "cpu":
        return 0
    check_documents(cu_seqlens, steps)
    return int((cu_seqlens.diff() > 0).sum())


def _lines(
    module: LSTM, input: Any, resets: Any, cu_seqlens: Any, there: Device | None, model: Model | None
) -> list[str]:
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
    plain = resets is None and not isinstance(input, PackedSequence)
    documents = 1
    if resets is not None:
        check_resets(resets, data)
    if cu_seqlens is not None:
        if isinstance(input, PackedSequence):
            raise ValueError("cu_seqlens goes with a batch of one sequence, and not with packed rows")
        steps = data.shape[1 if module.batch_first and data.dim() == 3 else 0]
        documents = _documents(cu_seqlens, resets, steps, batch)
        plain = documents == 1
        batch = max(1, documents)
    reason = _why_torch(module, plain, data, batch, there)
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
    if resets is not None or documents == 0:
        lines.append("segments begin where resets say: a step zeroes these rows")
    if documents > 1:
        lines.append(f"{documents} documents, side by side as a packed batch")
    directions = 2 if module.bidirectional else 1
    layers, trains = module.num_layers * directions, wants_gradient(data, *module.parameters())
    loops = f"{layers} time loop{'s' if layers > 1 else ''} forward{f' and {layers} backward' if trains else ''}"
    lines.append(f"Triton kernels, {loops}:")
    for backward in (False, True) if trains else (False,):
        lines += _plan(_problem(computed, data.device, batch, module.hidden_size, backward, directions, there), model)
    return lines


def _batch(module: LSTM, input: Any) -> int:
    if isinstance(input, PackedSequence):
        return int(input.batch_sizes[0])
    return 1 if input.dim() == 2 else int(input.shape[0 if module.batch_first else 1])


def _compute_dtype(data: torch.Tensor, there: Device | None) -> torch.dtype:
    """Autocast's dtype where autocast is on: for the GPU or, when asking about one from a laptop, for the CPU."""
    for kind in ("cuda", data.device.type) if there else (data.device.type,):
        if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) and data.dtype != torch.float64:
            return torch.get_autocast_dtype(kind)
    return data.dtype


def _why_torch(module: LSTM, plain: bool, data: torch.Tensor, batch: int, there: Device | None) -> str | None:
    """The reason for PyTorch's path, as the call itself would have it, or as it would be on another machine."""
    params = weights_of(module)
    try:
        if there is None:
            route = module._route(data, params, None, batch, not plain)
        else:
            measured: Any = {} if not plain else dict(batch=batch, params=params, has_biases=module.bias)
            route = decide_for(there.name, data, _compute_dtype(data, there), module.backend, **measured)
    except RuntimeError as error:
        return f"an error: {error}"
    return None if route.kernels else str(route.why_torch)


def _problem(
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    hidden_size: int,
    backward: bool,
    directions: int,
    there: Device | None,
) -> Problem:
    if there is None:
        from triton_lstm.kernels import device_facts

    facts = there or device_facts(device)
    precision = precision_name(dtype, torch.device("cuda") if there else device)
    if facts.backend == "hip" and precision == "tf32":
        precision = "fp32"
    return Problem(facts, precision, batch, hidden_size, backward, directions)


def _plan(problem: Problem, model: Model | None) -> list[str]:
    """A time loop's config, where it comes from, and what it should take."""
    choice = choose(problem)
    plan, tuned = choice.plan, choice.tuned
    lines = [f"{'backward' if problem.backward else 'forward'} ({problem.precision}): {plan.describe(problem.H)}"]
    if problem.device.backend == "interpreter":
        return [*lines, "  in Triton's interpreter on the CPU: for tests, not for speed"]
    if tuned is None:
        lines.append(f"  planned: nothing near H={problem.H}, B={problem.B} is measured; `triton-lstm tune` does that")
    else:
        of = "measured" if choice.exactly(problem) else "a neighbour's"
        before = f", {tuned.planned_us:.2f} as planned" if tuned.planned_us else ""
        times = f"{tuned.us:.2f} us a step at H={tuned.key.H}, B={tuned.key.B}{before}"
        lines.append(f"  tuned ({of}): {times}; {tuned.measured}")
    if plan.exchange == "flag":
        lines.append(f"  rows are loaded {problem.load_bytes} bytes at a time, missing ones again by element")
    if problem.directions == 2:
        both = directions_at_once(problem, plan) == 2
        lines.append(
            f"  {'both directions of time in one launch' if both else 'one direction of time after the other'}"
        )
    lines.append(f"  predicted: {cost(problem, plan)}")
    if model is not None:
        lines.append(f"  modelled: {model(problem, plan)}")
    mode = "training" if problem.backward else "inference"
    layer = layer_time(problem.device.name, mode, problem.precision, problem.H, problem.B)
    if layer is not None:
        faster = "faster" if layer.torch_us > layer.triton_us else "SLOWER"
        times = f"{layer.triton_us:.2f} us a step, {faster} than PyTorch's {layer.torch_us:.2f}"
        lines.append(f"  {mode} of a whole layer, measured: {times}")
    return lines
