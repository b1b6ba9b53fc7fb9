"""Weights that are rewritten, stored, loaded and moved by others: nn.LSTM, treated the same way, is the oracle."""

import pytest
import torch
from oracle import flat, twins
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

BACKENDS = ["triton", "torch"]


@pytest.fixture
def precise(device):
    """float64 where the kernels have it, and the tolerance to go with it."""
    if device.type == "cuda":
        return torch.float32, dict(rtol=2e-2, atol=2e-2)
    return torch.float64, dict(rtol=1e-10, atol=1e-12)


def trained(m, x):
    """Outputs and gradients of two steps of SGD, the parameters that this leaves, and the buffers."""
    results = []
    for _ in range(2):
        x = x.detach().requires_grad_()
        outputs = flat(m(x))
        m.zero_grad()
        sum((t * (k + 1)).square().sum() for k, t in enumerate(outputs)).backward()
        results += [*outputs, x.grad, *(p.grad for p in m.parameters())]
        with torch.no_grad():
            for p in m.parameters():
                p.sub_(p.grad, alpha=0.1)
    return [t.detach().cpu() for t in (*results, *m.parameters(), *m.buffers())]


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2

    def right_inverse(self, weight):
        return weight * 2


class Dropped(nn.Module):
    def forward(self, weight):
        return weight * nn.functional.dropout(torch.ones(weight.shape), 0.5, True).to(weight)


def halved(m):
    for name in list(m._flat_weights_names):
        parametrize.register_parametrization(m, name, Halved())


def removed(m):
    halved(m)
    m(torch.randn(5, 3, 4).to(m.weight_hh_l0))  # a call with the parametrizations, then one without
    for name in list(m._flat_weights_names):
        parametrize.remove_parametrizations(m, name, leave_parametrized=name.startswith("weight"))


def old_weight_norm_removed(m):
    nn.utils.weight_norm(m, "weight_hh_l0")
    m(torch.randn(5, 3, 4).to(m.weight_ih_l0))
    nn.utils.remove_weight_norm(m, "weight_hh_l0")


def pruned(m):
    prune.l1_unstructured(m, "weight_hh_l0", 0.3)
    prune.random_structured(m, "weight_ih_l0", 0.5, dim=1)


def pruned_for_good(m):
    pruned(m)
    prune.remove(m, "weight_hh_l0")


def weight_drop(m):
    """As in AWD-LSTM: the module's own parameter is taken away, and set as a plain tensor before every call."""
    raw = m.weight_hh_l0
    del m._parameters["weight_hh_l0"]
    m.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.detach().clone()))

    def drop(m, args):
        torch.manual_seed(3)
        m.weight_hh_l0 = nn.functional.dropout(m.weight_hh_l0_raw.cpu(), 0.5, True).to(args[0])

    m.register_forward_pre_hook(drop)


def replaced(m):
    m.weight_hh_l0 = nn.Parameter(m.weight_hh_l0.detach() * 2)
    m._parameters["bias_ih_l0"] = nn.Parameter(m.bias_ih_l0.detach() * 2)
    m.weight_ih_l0.data = m.weight_ih_l0.data * 2


def tied(m):
    m.bias_ih_l0 = m.bias_hh_l0


REWRITES = {
    "parametrized": halved,
    "parametrization removed": removed,
    "dropout as parametrization": lambda m: parametrize.register_parametrization(m, "weight_hh_l0", Dropped()),
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "old weight_norm": lambda m: nn.utils.weight_norm(m, "weight_hh_l0"),
    "old weight_norm removed": old_weight_norm_removed,
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0"),
    "old spectral_norm": lambda m: nn.utils.spectral_norm(m, "weight_hh_l0"),
    "orthogonal": lambda m: parametrizations.orthogonal(m, "weight_hh_l0"),
    "pruned": pruned,
    "pruned for good": pruned_for_good,
    "weight drop": weight_drop,
    "replaced": replaced,
    "tied": tied,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", REWRITES)
def test_rewritten_weights_train_as_those_of_nn_lstm(case, backend, device, precise):
    dtype, close = precise
    x = torch.randn(5, 3, 4, dtype=dtype)
    theirs, ours = twins(dtype=dtype, backend=backend)
    results = []
    for m, place in ((theirs, "cpu"), (ours, device)):
        torch.manual_seed(1)
        REWRITES[case](m)
        results.append(trained(m.to(place), x.to(place)))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for b, a in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **close)
