"""Runs a case of fuzz.py: by triton_lstm.LSTM in one of many ways, and by what it must be like."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fuzz import PLANS, Case
from interleave import concurrent_programs
from oracle import data_of, flat, state_shapes
from segments_alone import alone
from step_by_step import by_hand
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import triton_lstm

Tensor = torch.Tensor
Results = dict[str, Tensor | None]
Call = Callable[[Any, Any, Any], Any]  # (module, x, hx) -> (y, (h_n, c_n), ...)


@contextlib.contextmanager
def planned(case: Case) -> Iterator[None]:
    """The kernels have the case's plan; programs run concurrently where that needs it."""
    plan = PLANS[case.plan]
    with pytest.MonkeyPatch.context() as patched, contextlib.ExitStack() as stack:
        if plan is not None:
            patched.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: plan)
        if case.plan.endswith("at once"):
            stack.enter_context(concurrent_programs(case.seed))
        yield


def other(case: Case, kind: type[nn.LSTM], dtype: torch.dtype) -> nn.LSTM:
    """nn.LSTM or the reference with the case's weights."""
    module = kind(case.I, case.H, **case.options)
    case.give_weights(module, dtype)
    return module


def made(case: Case) -> Any:
    """Ours with the case's weights, constructed or from something else."""
    more: Any = dict(backend="triton", recompute=case.recompute)
    if case.made == "converted":
        module: Any = other(case, nn.LSTM, case.dtype)
        assert triton_lstm.convert(module, **more).converted
        return module
    module = triton_lstm.LSTM(case.I, case.H, **case.options, **more)
    case.give_weights(module, case.dtype)
    if case.made == "there and back":
        triton_lstm.convert(module, back=True)
        assert type(module) is nn.LSTM
        triton_lstm.convert(module, **more)
    elif case.made == "loaded":
        state = module.state_dict()
        module = triton_lstm.LSTM(case.I, case.H, **case.options, **more, dtype=case.dtype).train(case.training)
        module.load_state_dict(state)
        for name, weight in module.named_parameters():
            weight.requires_grad_(name not in case.frozen)
    elif case.made == "copied":
        module = copy.deepcopy(module)
    elif case.made == "pickled":
        module = pickle.loads(pickle.dumps(module))
    return module


def theirs(case: Case) -> Call:
    """nn.LSTM in the place of ours: each segment alone, and padded sequences packed."""

    def call(module: nn.RNNBase, x: Any, hx: Any) -> Any:
        resets = case.resets(module)
        if resets is not None:
            return alone(module, x, hx, resets, list(case.lengths) if case.layout == "lengths" else None)
        if case.layout != "lengths":
            return module(x, hx)
        packed = pack_padded_sequence(x, torch.tensor(case.lengths), module.batch_first, enforce_sorted=False)
        y, states = module(packed, hx)
        return pad_packed_sequence(y, module.batch_first, total_length=case.T)[0], states

    return call


def arguments(case: Case, module: nn.RNNBase) -> dict[str, Any]:
    """What ours takes besides x and hx."""
    resets = case.resets(module)
    more: dict[str, Any] = dict(resets=resets)
    if case.layout == "cu_seqlens":
        cuts = [0, *resets.flatten().nonzero().flatten().tolist(), case.T]
        more = dict(cu_seqlens=cuts if case.seed % 2 else torch.tensor(cuts, dtype=torch.int32))
    if case.layout == "lengths":
        more["lengths"] = list(case.lengths) if case.seed % 2 else torch.tensor(case.lengths)
    return more | (dict(return_states=True) if case.return_states else {})


def ours(case: Case) -> Call:
    """The case's way of calling ours."""

    def call(module: Any, x: Any, hx: Any) -> Any:
        more = arguments(case, module)
        if case.called == "functional_call":
            return torch.func.functional_call(module, dict(module.named_parameters()), (x, hx), more)
        if case.called == "lstm()":
            return functional(case, module, x, hx, more)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.called == "autocast"):
            return module(x, hx, **more)

    return vmapped(call) if case.called == "vmap" else call


def functional(case: Case, module: Any, x: Any, hx: Any, more: dict[str, Any]) -> Any:
    """By triton_lstm.lstm, which has states in the order of packed rows."""
    names = ("bias", "num_layers", "dropout", "training", "bidirectional", "batch_first")
    params, options = list(module.parameters()), [getattr(module, name) for name in names]
    more |= dict(recompute=case.recompute, backend="triton")
    if not isinstance(x, PackedSequence):
        y, h_n, c_n, *states = triton_lstm.lstm(x, hx, params, *options, **more)
        return y, (h_n, c_n), *states
    hx = hx and module.permute_hidden(hx, x.sorted_indices)
    y, h_n, c_n, *states = triton_lstm.lstm(x.data, hx, params, *options, batch_sizes=x.batch_sizes, **more)
    states = [[[x._replace(data=t) for t in layer] for layer in layers] for layers in states]
    return x._replace(data=y), module.permute_hidden((h_n, c_n), x.unsorted_indices), *states


def vmapped(call: Call) -> Call:
    """A call for two inputs at once, of which the second one is random and not read."""

    def first(module: Any, x: Tensor, hx: Any) -> Any:
        pairs = [torch.stack([t, torch.randn_like(t)]) for t in (x, *(hx or ()))]
        both = torch.func.vmap(lambda x, *hx: tuple(flat(call(module, x, hx or None))), randomness="same")(*pairs)
        y, h_n, c_n = (t[0] for t in both)
        return y, (h_n, c_n)

    return first


def in_bfloat16(case: Case) -> Call:
    """What autocast means: everything in bfloat16."""

    def call(module: Any, x: Any, hx: Any) -> Any:
        weights = {name: weight.bfloat16() for name, weight in module.named_parameters()}
        x = x._replace(data=x.data.bfloat16()) if isinstance(x, PackedSequence) else x.bfloat16()
        hx = hx and tuple(state.bfloat16() for state in hx)
        return torch.func.functional_call(module, weights, (x, hx), arguments(case, module))

    return call


def outputs_of(result: Any) -> dict[str, Tensor]:
    return dict(zip(("y", "h_n", "c_n"), (data_of(result[0]), *result[1]), strict=True))


def run(case: Case, module: nn.RNNBase, call: Call, number: int = 0) -> Results:
    """y, h_n and c_n of one draw, and the gradients of what is not frozen: d and its name; dd: the second ones.

    A gradient is None where autograd has none.
    """
    leaves = case.leaves(module, number)
    module.zero_grad()
    torch.manual_seed(case.seed)  # of dropout
    if case.called in ("no_grad", "inference_mode"):
        with getattr(torch, case.called)():
            return {**outputs_of(call(module, *case.inputs(module, leaves)))}
    inputs = case.inputs(module, leaves)
    leaves |= dict(module.named_parameters())
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    outputs = outputs_of(call(module, *inputs))
    results: Results = {name: output.detach() for name, output in outputs.items()}
    read = {name: cotangent for name, cotangent in case.cotangents(outputs).items() if outputs[name].requires_grad}
    if not read:
        return results
    losses, cotangents = [outputs[name] for name in read], list(read.values())
    if not case.twice:
        torch.autograd.backward(losses, cotangents)
        assert all(leaf.grad is None for name, leaf in leaves.items() if name not in wanted)
        return results | {f"d{name}": leaf.grad for name, leaf in wanted.items()}
    inputs = list(wanted.values())
    first = torch.autograd.grad(losses, inputs, cotangents, create_graph=True, allow_unused=True)
    curved = sum(grad.square().sum() for grad in first if grad is not None)
    second = torch.autograd.grad(curved, inputs, allow_unused=True)
    results |= {f"d{name}": None if grad is None else grad.detach() for name, grad in zip(wanted, first, strict=True)}
    return results | {f"dd{name}": grad for name, grad in zip(wanted, second, strict=True)}


def run_by_vjp(case: Case, module: nn.RNNBase, number: int = 0) -> Results:
    """As `run`, the gradients by torch.func."""
    weights = dict(module.named_parameters())
    leaves = {name: leaf.detach() for name, leaf in (case.leaves(module, number) | weights).items()}

    def outputs(given: dict[str, Tensor]) -> dict[str, Tensor]:
        every = leaves | given
        params = {name: every[name] for name in weights}
        return outputs_of(
            torch.func.functional_call(module, params, case.inputs(module, every), arguments(case, module))
        )

    torch.manual_seed(case.seed)
    results, pull = torch.func.vjp(outputs, {name: leaf for name, leaf in leaves.items() if name not in case.frozen})
    zeros = {name: torch.zeros_like(output) for name, output in results.items()}
    (gradients,) = pull(zeros | case.cotangents(results))
    return results | {f"d{name}": gradient for name, gradient in gradients.items()}


def columns(case: Case, t: Any) -> list[Tensor]:
    """Every sequence (T, 1, ..) of what has the layout of x."""
    if isinstance(t, PackedSequence):
        t = pad_packed_sequence(t)[0]
    elif case.layout == "unbatched":
        t = t.unsqueeze(1)
    elif case.options["batch_first"]:
        t = t.transpose(0, 1)
    return [t[:n, b : b + 1] for b, n in enumerate(case.lengths)]


def states_of(case: Case, module: Any) -> list[Tensor]:
    """c, i, f, g and o of every layer and sequence, as ours returns them."""
    layers = ours(case)(module, *case.inputs(module, case.leaves(module, 0)))[2]
    return [column for layer in layers for t in layer for column in columns(case, t)]


def states_by_hand(case: Case, module: nn.RNNBase) -> list[Tensor]:
    """The same, step by step."""
    x, hx = case.inputs(module, case.leaves(module, 0))
    resets = case.resets(module)
    resets = data_of(x)[..., 0] != data_of(x)[..., 0] if resets is None else resets
    resets = x._replace(data=resets) if isinstance(x, PackedSequence) else resets
    zeros = [torch.zeros(shape, dtype=torch.float64) for shape in state_shapes(module, len(case.lengths))]
    h0, c0 = zeros if hx is None else [state.view(zero.shape) for state, zero in zip(hx, zeros, strict=True)]
    found = []
    for b, (sequence, begins) in enumerate(zip(columns(case, x), columns(case, resets), strict=True)):
        found.append(by_hand(module, sequence, (h0[:, b : b + 1], c0[:, b : b + 1]), begins[:, 0]))
    return [of_one[layer][k] for layer in range(module.num_layers) for k in range(5) for of_one in found]
