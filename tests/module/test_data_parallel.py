"""Data parallelism with its options, and with recording in some processes: no warning, no other collectives, and the
weights of one process with the whole batch."""

import contextlib
import itertools
import os
import tempfile
import warnings

import pytest
import torch
from processes import WORLD, in_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import triton_lstm
import triton_lstm.module
from triton_lstm.core.weights import flatten_for_cudnn
from triton_lstm.dispatch import no_kernel_for
from triton_lstm.perf.collectives import Collectives

STEPS = 3  # in the first one DistributedDataParallel has a single bucket
MODELS = {
    "directions": dict(num_layers=2, bidirectional=True),
    "projection": dict(num_layers=3, proj_size=2),
    "no bias": dict(num_layers=2, bias=False),
    "frozen": dict(num_layers=2, frozen=("lstm.weight_hh_l0", "lstm.bias_ih_l1", "lstm.weight_ih_l1")),
    "unused": dict(num_layers=2, unused=True),
}
OPTIONS = {
    "no option": {},
    "static_graph": dict(static_graph=True),
    "find_unused_parameters": dict(find_unused_parameters=True),
}
WRAPPED = [
    (backend, model, option, views)
    for backend in ("torch", "triton")
    for model in MODELS
    for option in OPTIONS
    for views in (False, True)
    if model != "unused" or option != "no option"  # which DistributedDataParallel needs for it
    if backend == "torch" or views  # to save time
]
NO_UNUSED = "find_unused_parameters=True was specified in DDP constructor, but did not find any unused parameters"
# Which process records which steps
RECORDED = {
    "nobody": lambda rank, step: False,
    "everyone": lambda rank, step: True,
    "one process": lambda rank, step: rank == 1,
    "one process, every second step": lambda rank, step: rank == 0 and step % 2 == 0,
    "in turn": lambda rank, step: (rank + step) % WORLD == 0,
}
STRATEGIES = ("DistributedDataParallel", "fully_shard")


class Model(nn.Module):
    def __init__(self, lstm_class, frozen=(), unused=False, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = lstm_class(3, 4, **kwargs)
        self.head = nn.Linear(kwargs.get("proj_size", 4) * (2 if kwargs.get("bidirectional") else 1), 2)
        if unused:
            self.unused = nn.Parameter(torch.ones(3))
        for name in frozen:
            self.get_parameter(name).requires_grad_(False)
        self.double()

    def forward(self, x):
        return self.head(self.lstm(x)[0].flatten(0, 1))


def train(model, share=slice(None), record=lambda step: False, note=None):
    """Weights after some steps, each recorded or not, and how many layers were recorded in each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = next(model.parameters())
    x = torch.randn(STEPS, 2, 2 * WORLD, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(weight)
    recorded = []
    with Collectives(note) if note else contextlib.nullcontext():
        for step in range(STEPS):
            optimizer.zero_grad()
            with triton_lstm.record_gradients(model) if record(step) else contextlib.nullcontext() as found:
                model(x[step][:, share]).square().mean().backward()
            optimizer.step()
            recorded.append(0 if found is None else len(found))
    return {name.removeprefix("module."): _whole(w).detach() for name, w in model.named_parameters()}, recorded


def _whole(weight):
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def share_of(rank):
    return slice(2 * rank, 2 * rank + 2)


@contextlib.contextmanager
def warned():
    """A list, of all warnings afterwards: Python's, and what PyTorch's C++ code writes to stderr, where a thread of its
    own, or one without the interpreter's lock, warns."""
    texts, stderr = [], os.dup(2)
    with tempfile.TemporaryFile() as file, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        os.dup2(file.fileno(), 2)
        try:
            yield texts
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            texts.extend([*(str(warning.message) for warning in seen), *file.read().decode().splitlines()])


def with_options(rank, backend, model, option, views):
    """Weights and warnings."""
    options = dict(bucket_cap_mb=1e-5, gradient_as_bucket_view=views, **OPTIONS[option])
    with warned() as texts:
        model = Model(triton_lstm.LSTM, backend=backend, **MODELS[model])
        weights, _ = train(DistributedDataParallel(model, **options), share_of(rank))
    return weights, texts


def with_recording(rank, backend, strategy, which):
    """Weights, the collectives, and how many layers were recorded in each step."""
    model, collectives = Model(triton_lstm.LSTM, backend=backend, num_layers=2), []
    if strategy == "fully_shard":
        mesh = init_device_mesh("cpu", (WORLD,))
        for module in (model.lstm, model.head, model):
            fully_shard(module, mesh=mesh)
    else:
        model = DistributedDataParallel(model, bucket_cap_mb=1e-4)
    weights, recorded = train(model, share_of(rank), lambda step: RECORDED[which](rank, step), collectives.append)
    return weights, collectives, recorded


def work(rank):
    results = {"no kernels": no_kernel_for("cpu", torch.float64)}
    ways = ["torch"] if results["no kernels"] else ["torch", "triton"]
    for case in WRAPPED:
        if case[0] in ways:
            results[case] = with_options(rank, *case)
    for case in itertools.product(ways, STRATEGIES, RECORDED):
        results[case] = with_recording(rank, *case)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return in_processes(work, tmp_path_factory.mktemp("processes"))


@pytest.fixture
def found(results, backend):
    """The results, if they have some of this backend."""
    if backend == "triton" and (reason := results[0]["no kernels"]):
        pytest.skip(str(reason))
    return results


@pytest.mark.parametrize("backend, model, option, views", WRAPPED)
def test_options_give_no_warning_and_the_weights_of_one_process(backend, model, option, views, found):
    """Neither of cuDNN, of weights that are not one chunk, nor of the reducer, of gradients' strides."""
    expected, _ = train(Model(nn.LSTM, **MODELS[model]))
    for of_rank in found:
        weights, texts = of_rank[backend, model, option, views]
        assert [text for text in texts if NO_UNUSED not in text] == []
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("which", RECORDED)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_recording_changes_no_collective(backend, strategy, which, found):
    """Else processes would wait for each other for ever."""
    weights, collectives, _ = found[0][backend, strategy, "nobody"]
    assert len(collectives) > STEPS
    for rank, of_rank in enumerate(found):
        their_weights, theirs, layers = of_rank[backend, strategy, which]
        assert theirs == collectives
        assert all(torch.equal(their_weights[name], weight) for name, weight in weights.items())
        assert [number > 0 for number in layers] == [RECORDED[which](rank, step) for step in range(STEPS)]


@pytest.fixture
def alone(tmp_path):
    """A process group of this process only."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded_alone(model, kind):
    return fully_shard(model, mesh=init_device_mesh(kind, (1,)))


def test_weights_of_fully_shard_stay_where_it_gathers_them(alone, monkeypatch):
    """cuDNN wants them in one buffer, where they would keep the values of the first step."""

    def flatten(module):  # as cuDNN does
        weights = [getattr(module, name) for name in module._flat_weights_names]
        buffer = torch.cat([weight.detach().flatten() for weight in weights])
        for weight, part in zip(weights, buffer.split([weight.numel() for weight in weights]), strict=True):
            weight.data = part.view(weight.shape)

    def on_a_gpu(*args):
        with pytest.MonkeyPatch.context() as pretence:
            pretence.setattr(torch.Tensor, "is_cuda", True, raising=False)
            flatten_for_cudnn(*args)

    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", flatten)
    monkeypatch.setattr(triton_lstm.module, "flatten_for_cudnn", on_a_gpu)
    expected, _ = train(Model(nn.LSTM))
    for wrap in (lambda model: model, lambda model: sharded_alone(model, "cpu")):
        weights, _ = train(wrap(Model(triton_lstm.LSTM, backend="torch")))
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_fully_shard_on_the_device(backend, alone, device):
    expected, _ = train(Model(nn.LSTM).float().to(device))
    weights, _ = train(sharded_alone(Model(triton_lstm.LSTM, backend=backend).float().to(device), device.type))
    torch.testing.assert_close(weights, expected)
