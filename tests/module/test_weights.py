"""Weights that are rewritten, stored, loaded and moved by others: nn.LSTM, treated the same way, is the oracle."""

import copy
import io
import pickle

import pytest
import torch
from oracle import flat, twins
from torch import nn
from torch._functorch import config as functorch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize, prune

import triton_lstm

BACKENDS = ["triton", "torch"]


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


def called(m):
    """Where the kernels run, and back."""
    m.to("cuda" if torch.cuda.is_available() else "cpu")
    m(torch.randn(5, 3, 4).to(next(m.parameters())))
    m.cpu()


def removed(m):
    halved(m)
    called(m)  # with the parametrizations, then without
    for name in list(m._flat_weights_names):
        parametrize.remove_parametrizations(m, name, leave_parametrized=name.startswith("weight"))


def old_weight_norm_removed(m):
    nn.utils.weight_norm(m, "weight_hh_l0")
    called(m)
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


def of_2018(state):
    """all_weights held the tensors, and nothing else named them."""
    for name in ("_all_weights", "_flat_weights_names", "_flat_weights", "proj_size"):
        del state[name]
    state["all_weights"] = [[torch.zeros(0)]]


OLD_STATES = {
    "before proj_size": lambda state: state.pop("proj_size"),
    "all_weights of names": lambda state: state.update(all_weights=state.pop("_all_weights")),
    "all_weights of tensors": of_2018,
}


@pytest.mark.parametrize("case", OLD_STATES)
@pytest.mark.parametrize("kwargs", [dict(), dict(num_layers=2, bidirectional=True, bias=False)], ids=str)
def test_old_checkpoints_are_completed(case, kwargs, device, precise):
    """Checkpoints of nn.LSTM, which have no backend either."""
    dtype, close = precise
    theirs, _ = twins(dtype=dtype, **kwargs)
    results = []
    for cls, place in ((nn.LSTM, "cpu"), (triton_lstm.LSTM, device)):
        state = theirs.__getstate__()
        OLD_STATES[case](state)
        loaded = cls.__new__(cls)
        loaded.__setstate__(copy.deepcopy(state))
        assert loaded.proj_size == 0 and loaded._all_weights == theirs._all_weights
        assert loaded._flat_weights_names == theirs._flat_weights_names
        torch.manual_seed(1)
        results.append(trained(loaded.to(place), torch.randn(5, 3, 4, dtype=dtype).to(place)))
    for b, a in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **close)


def stored(m):
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def assigned(m):
    loaded = type(m)(4, 6, 2, proj_size=2, device="meta")
    loaded.load_state_dict(m.state_dict(), assign=True)
    return loaded


def emptied(m):
    device = m.weight_hh_l0.device
    m = m.to("meta").to_empty(device=device)
    with torch.no_grad():
        for k, p in enumerate(m.parameters()):
            p.copy_(torch.linspace(-0.1, 0.1, p.numel()).view(p.shape) * k)
    return m


def swapped(m):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return m.half().double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def through_a_vector(m):
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(m.parameters()) / 2, m.parameters())
    return m


def loaded_in_part(m):
    keys = m.load_state_dict({"weight_hh_l0": m.weight_hh_l0 / 2, "other": torch.zeros(1)}, strict=False)
    assert keys.unexpected_keys == ["other"] and len(keys.missing_keys) == 9
    return m


MOVES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": stored,
    "assigned": assigned,
    "to_empty": emptied,
    "to another dtype": lambda m: m.half().double(),
    "swapped": swapped,
    "through a vector": through_a_vector,
    "loaded in part": loaded_in_part,
    "double parameters": lambda m: m._apply(lambda t: t * 2),
}


@pytest.mark.parametrize("case", MOVES)
def test_moved_weights_train_as_those_of_nn_lstm(case, device):
    """After a call, so that what the call remembers is moved too; in float64, which goes to PyTorch on a GPU."""
    theirs, ours = twins(device, dtype=torch.float64, num_layers=2, proj_size=2)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    results = []
    for m, place in ((theirs, "cpu"), (ours, device)):
        m(x.to(place))
        moved = MOVES[case](m)
        results.append(trained(moved, x.to(place)))
        for known in (moved._flat_weights, [ref() for ref in moved._flat_weight_refs]):
            assert all(a is b for a, b in zip(known, moved.parameters(), strict=True))
    for b, a in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_an_nn_lstm_may_be_given_our_class():
    theirs, _ = twins()
    x = torch.randn(5, 3, 4)
    expected = theirs(x)[0]
    theirs.__class__ = triton_lstm.LSTM
    torch.testing.assert_close(theirs(x)[0], expected, rtol=1e-5, atol=1e-6)


REFUSALS = {
    "sizes": lambda m: m.load_state_dict(type(m)(4, 7).state_dict()),
    "keys": lambda m: m.load_state_dict({"other": torch.zeros(1)}),
    "sizes and not strict": lambda m: m.load_state_dict(type(m)(4, 7).state_dict(), strict=False),
    "meta": lambda m: m.to("meta").to("cpu"),
    "no module of that name": lambda m: torch.func.functional_call(m, {"x.y": torch.zeros(1)}, torch.zeros(5, 3, 4)),
    "pickled parametrization": lambda m: halved(m) or pickle.dumps(m),
    "integers": lambda m: m.to(torch.int64),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_those_of_nn_lstm(case):
    texts = []
    for m in twins():
        with pytest.raises((RuntimeError, NotImplementedError, TypeError, AttributeError)) as error:
            REFUSALS[case](m)
        texts.append((error.type, str(error.value)))
    assert texts[0] == texts[1]


def test_replicas_of_data_parallel_have_separate_lists():
    _, ours = twins()
    replica = ours._replicate_for_data_parallel()
    for name, parameter in ours.named_parameters():
        setattr(replica, name, parameter * 2)  # plain tensors, as DataParallel sets them
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    doubled = {name: parameter * 2 for name, parameter in ours.named_parameters()}
    x = torch.randn(5, 3, 4)
    assert torch.equal(replica(x)[0], torch.func.functional_call(ours, doubled, (x,))[0])


def test_fake_and_meta_modules():
    with FakeTensorMode():
        y, (h_n, c_n) = triton_lstm.LSTM(4, 6, 2, proj_size=2, bidirectional=True)(torch.randn(5, 3, 4))
        assert y.shape == (5, 3, 4) and h_n.shape == (4, 3, 2) and c_n.shape == (4, 3, 6)
    module = triton_lstm.LSTM(4, 6, batch_first=True, device="meta")
    y, (h_n, c_n) = module(torch.randn(3, 5, 4, device="meta"))
    y.sum().backward()
    assert y.is_meta and y.shape == (3, 5, 6) and h_n.shape == c_n.shape == (1, 3, 6)
    assert module.weight_hh_l0.grad.is_meta


@pytest.mark.parametrize("kwargs", [{}, {"bidirectional": True}, {"bidirectional": True, "proj_size": 2}], ids=str)
@pytest.mark.parametrize("backend", [None, "aot_eager"])
@functorch.patch(donated_buffer=False)  # else some compiled backward passes run only once
def test_every_gradient_has_memory_of_its_own(backend, kwargs, device):
    """Or they would not add up over several backward passes: b_ih and b_hh have the same gradient."""
    module = triton_lstm.LSTM(4, 6, 2, backend="triton", **kwargs).to(device)
    call = torch.compile(module, backend=backend) if backend else module
    loss = call(torch.randn(3, 2, 4, device=device))[0].sum()
    for gradients in (torch.autograd.grad(loss, list(module.parameters()), retain_graph=True), None):
        if gradients is None:
            loss.backward()
            gradients = [parameter.grad for parameter in module.parameters()]
        places = [gradient.data_ptr() for gradient in gradients]
        assert len(set(places)) == len(places)


def test_a_bias_that_is_none_is_an_error():
    module = triton_lstm.LSTM(4, 6)
    module.bias_hh_l0 = None
    with pytest.raises(TypeError, match="params must contain tensors only"):
        module(torch.randn(3, 2, 4))
