"""The results of nn.LSTM, and whether others are as close to them as triton_lstm/core/tolerance.py requires."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import triton_lstm
from triton_lstm.core.reference import Reference
from triton_lstm.core.tolerance import Allowance, draws

Tensors = dict[str, torch.Tensor]


def data_of(x: Any) -> torch.Tensor:
    """A PackedSequence's rows, or the tensor itself."""
    return x.data if isinstance(x, PackedSequence) else x


def run(module: nn.Module, x: Any, hx: Any, seed: int = 1, call: Any = None) -> Tensors:
    """Every output of `module` and every gradient, for N(0, 1) cotangents on output, h_n and c_n.

    call: (module, x, hx) -> its results, if they are not module(x, hx).
    """
    rows = data_of(x).detach().clone().requires_grad_()
    x = x._replace(data=rows) if isinstance(x, PackedSequence) else rows
    hx = None if hx is None else tuple(state.detach().clone().requires_grad_() for state in hx)
    y, (h_n, c_n) = module(x, hx) if call is None else call(module, x, hx)
    y = data_of(y)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (y, h_n, c_n)]
    module.zero_grad()
    torch.autograd.backward([y, h_n, c_n], cotangents)
    results = {"y": y, "h_n": h_n, "c_n": c_n, "dx": rows.grad}
    if hx is not None:
        results |= {"dh0": hx[0].grad, "dc0": hx[1].grad}
    return {k: v.detach() for k, v in (results | {f"d{n}": p.grad for n, p in module.named_parameters()}).items()}


def assert_like_nn_lstm(
    module: nn.RNNBase, draw: Callable[[], tuple[Any, Any]], *, ours: Any = None, theirs: Any = None, **kwargs: Any
) -> None:
    """Compares `module` with nn.LSTM and the reference of the same weights, in its own dtype and in float64.

    kwargs: nn.LSTM's. ours, theirs: how `module` and those are called, see `run`.

    draw: returns a random input and hx. Compares the first draw on which all zeros would fail for every result.
    """
    dtypes = (torch.float64, next(module.parameters()).dtype)
    drawn = [draw()]
    rows = data_of(drawn[0][0])
    fewest = rows[..., 0].numel() * min(module.input_size, module.proj_size or module.hidden_size)
    drawn += [draw() for _ in range(1, draws(fewest))]

    def answers(kind: type[nn.LSTM], dtype: torch.dtype) -> list[Tensors]:
        twin = kind(module.input_size, module.hidden_size, **kwargs).to(next(module.parameters()).device, dtype)
        twin.load_state_dict(module.state_dict())
        cast = [(x.to(dtype), None if hx is None else tuple(state.to(dtype) for state in hx)) for x, hx in drawn]
        return [run(twin, *inputs, call=theirs) for inputs in cast]

    (exact, same), reference = ([answers(kind, dtype) for dtype in dtypes] for kind in (nn.LSTM, Reference))
    allowance = Allowance(exact, same, (reference[0], reference[1]))
    got = run(module, *drawn[allowance.draw], call=ours)
    assert {k: t.dtype for k, t in got.items()} == {k: t.dtype for k, t in same[0].items()}
    for name, tensor in got.items():
        shape = allowance.exact[name].shape
        assert tensor.shape == shape, f"{name}: {tuple(tensor.shape)} instead of {tuple(shape)}"
        share = allowance.share(name, tensor)
        assert share <= 1, f"{name}: {share:.3g} times the error that is allowed"


def state_shapes(module: nn.RNNBase, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of h0 and c0."""
    groups = module.num_layers * (2 if module.bidirectional else 1)
    return (groups, batch, module.proj_size or module.hidden_size), (groups, batch, module.hidden_size)


def flat(result: tuple[torch.Tensor, Any]) -> list[torch.Tensor]:
    """output, h_n and c_n of a call."""
    return [result[0], *result[1]]


def twins(device: Any = "cpu", *, backend: str | None = None, **kwargs: Any) -> tuple[nn.LSTM, triton_lstm.LSTM]:
    """nn.LSTM(4, 6) on the CPU, and ours on `device` with the same weights; kwargs are nn.LSTM's."""
    torch.manual_seed(0)
    theirs, ours = nn.LSTM(4, 6, **kwargs), triton_lstm.LSTM(4, 6, **kwargs, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours.to(device)
