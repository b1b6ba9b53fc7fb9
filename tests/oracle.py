"""What nn.LSTM answers, and the one rule that says how close an answer must be to it."""

from typing import Any

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]


DRAWS = 3  # of inputs on which PyTorch's own error is measured, next to the case's own: one draw can be exact by luck


def assert_close(name: str, got: torch.Tensor, exact: torch.Tensor, own: list[torch.Tensor]) -> None:
    """err <= 2 * (PyTorch's own error in this dtype) + eps, both against float64, by RMS and by maximum.

    own: PyTorch's differences from float64 in this dtype, one for each draw of inputs.
    """
    assert got.shape == exact.shape, f"{name}: {tuple(got.shape)} instead of {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    eps = torch.finfo(got.dtype).eps * max(1.0, exact.abs().max().item())
    if got.dtype == torch.float64:
        eps *= 16
    for norm in (lambda t: t.square().mean().sqrt().item(), lambda t: t.abs().max().item()):
        bound = 2 * max(map(norm, own)) + eps
        error = norm(got.double() - exact)
        assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}"
        if exact.any():
            assert norm(exact) > bound, f"{name}: zeros would pass; the answer is {norm(exact):.3g}, allowed {bound:.3g}"


def run(module: nn.Module, x: torch.Tensor, hx: Any, seed: int = 1) -> Tensors:
    """Every output of `module` and every gradient, for N(0, 1) cotangents on output, h_n and c_n."""
    x = x.detach().clone().requires_grad_()
    hx = None if hx is None else tuple(state.detach().clone().requires_grad_() for state in hx)
    y, (h_n, c_n) = module(x, hx)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (y, h_n, c_n)]
    module.zero_grad()
    torch.autograd.backward([y, h_n, c_n], cotangents)
    results = {"y": y, "h_n": h_n, "c_n": c_n, "dx": x.grad}
    if hx is not None:
        results |= {"dh0": hx[0].grad, "dc0": hx[1].grad}
    return {k: v.detach() for k, v in (results | {f"d{n}": p.grad for n, p in module.named_parameters()}).items()}


def assert_like_nn_lstm(module: nn.RNNBase, x: torch.Tensor, hx: Any, **kwargs: Any) -> None:
    """Compares `module` with nn.LSTM of the same weights, in its own dtype and in float64; kwargs are nn.LSTM's."""
    twin = nn.LSTM(module.input_size, module.hidden_size, **kwargs).to(x)
    twin.load_state_dict(module.state_dict())
    wide = nn.LSTM(module.input_size, module.hidden_size, **kwargs).to(x.device, torch.float64)
    wide.load_state_dict(module.state_dict())
    got = run(module, x, hx)
    own: dict[str, list[torch.Tensor]] = {}
    for draw in range(1 + DRAWS):
        if draw:
            x, hx = torch.randn_like(x), None if hx is None else tuple(map(torch.randn_like, hx))
        same = run(twin, x, hx)
        exact = run(wide, x.double(), None if hx is None else tuple(state.double() for state in hx))
        if not draw:
            reference = exact
            assert {k: t.dtype for k, t in got.items()} == {k: t.dtype for k, t in same.items()}
        for name in same:
            own.setdefault(name, []).append(same[name].double() - exact[name])
    for name in got:
        assert_close(name, got[name], reference[name], own[name])


def enlarge(module: nn.Module) -> nn.Module:
    """Doubles the weights: an untrained LSTM's small outputs lie below the rule's eps in 16 bits."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(2)
    return module


def state_shapes(module: nn.RNNBase, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of h0 and c0."""
    groups = module.num_layers * (2 if module.bidirectional else 1)
    return (groups, batch, module.proj_size or module.hidden_size), (groups, batch, module.hidden_size)
