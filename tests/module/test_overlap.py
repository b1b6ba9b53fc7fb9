"""What of a backward pass's communication can run while lower layers are being differentiated: by the order of events,
not by time."""

import contextlib

import pytest
import torch
from processes import WORLD, in_processes
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import triton_lstm
from triton_lstm.dispatch import no_kernel_for
from triton_lstm.operator import autograd
from triton_lstm.perf.collectives import Collectives

INPUT, HIDDEN, LAYERS, STEPS = 3, 4, 3, 3  # in the first step DistributedDataParallel has a single bucket
BEGINS = "a layer's back-propagation through time begins"
# Arguments of the LSTM, and the dtype of autocast
REDUCED = {
    "float32": ({}, None),
    "autocast": ({}, torch.bfloat16),
    "directions": (dict(bidirectional=True), None),
    "directions, autocast": (dict(bidirectional=True), torch.float16),
    "projection": (dict(proj_size=2), None),
    "projection, autocast": (dict(proj_size=2), torch.bfloat16),
}
SHARDED = {"one module": False, "a module of each layer": True}


class Model(nn.Module):
    def __init__(self, each=False, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        width = kwargs.get("proj_size", HIDDEN) * (2 if kwargs.get("bidirectional") else 1)
        sizes = [(width if k else INPUT, HIDDEN) for k in range(LAYERS)] if each else [(INPUT, HIDDEN, LAYERS)]
        self.lstms = nn.ModuleList(triton_lstm.LSTM(*of_one, backend="triton", **kwargs) for of_one in sizes)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        for lstm in self.lstms:
            x, _ = lstm(x)
        return self.head(x.flatten(0, 1))


@contextlib.contextmanager
def noted(events):
    original = autograd.layer_backward

    def layer_backward(*args, **kwargs):
        events.append(BEGINS)
        return original(*args, **kwargs)

    autograd.layer_backward = layer_backward
    try:
        yield
    finally:
        autograd.layer_backward = original


def last_backward(model, events, dtype=None):
    """Some steps of training; afterwards `events` has those of the last backward pass."""
    for _ in range(STEPS):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = model(torch.randn(2, 2, INPUT)).float().square().mean()
        events.clear()
        with noted(events):
            loss.backward()


def reduced(kwargs, dtype):
    """With DistributedDataParallel: a list of the weights in each bucket, when it is handed over."""
    model = Model(**kwargs)
    events, names = [], {weight: name for name, weight in model.named_parameters()}
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-5)

    def hook(state, bucket):
        events.append([names[weight] for weight in bucket.parameters()])
        return allreduce_hook(state, bucket)

    wrapped.register_comm_hook(None, hook)
    last_backward(wrapped, events, dtype)
    return events


def sharded(each):
    """With fully_shard of every LSTM and of the head: the collectives."""
    model = Model(each)
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in (*model.lstms, model.head, model):
        fully_shard(module, mesh=mesh)
    events = []
    with Collectives(events.append):
        last_backward(model, events)
    return events


def work(rank):
    if reason := no_kernel_for("cpu", torch.float32):
        return str(reason)
    results = {name: reduced(*case) for name, case in REDUCED.items()}
    return results | {name: sharded(each) for name, each in SHARDED.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return in_processes(work, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", REDUCED)
def test_buckets_leave_before_the_layer_below_begins(name, results):
    weights = dict(Model(**REDUCED[name][0]).named_parameters())
    for of_rank in results:
        events = of_rank[name]
        begins = [place for place, event in enumerate(events) if event == BEGINS]
        assert len(begins) == LAYERS
        for layer, end in zip(reversed(range(1, LAYERS)), begins[1:], strict=True):
            left = {weight for event in events[:end] if event != BEGINS for weight in event}
            of_layer = {weight for weight in weights if f"_l{layer}" in weight}
            assert of_layer and of_layer <= left


def test_layers_of_one_sharded_module_wait_for_each_other(results):
    """fully_shard's unit is a module: with a whole LSTM, only the head's gradients leave before the end."""
    model = Model()
    for of_rank in results:
        assert _without_gathers(of_rank["one module"]) == [
            _scatter(model.head),
            *[BEGINS] * LAYERS,
            _scatter(*model.lstms),
        ]


def test_sharded_modules_of_one_layer_overlap(results):
    """Their gradients leave before the layer below begins, and its weights are asked for before they are computed."""
    model = Model(each=True)
    upwards = [event for lstm in model.lstms for event in (_scatter(lstm), BEGINS)]
    for of_rank in results:
        events = of_rank["a module of each layer"]
        assert _without_gathers(events) == [_scatter(model.head), *reversed(upwards)]
        begins = [place for place, event in enumerate(events) if event == BEGINS]
        gathered = [sum(event[0] == "all-gather" for event in events[:place]) for place in begins]
        assert gathered == [3, 4, 4]  # the head's, and those of the layer and of the next one


def _without_gathers(events):
    return [event for event in events if event == BEGINS or event[0] != "all-gather"]


def _scatter(*modules):
    return "reduce-scatter", sum(weight.nbytes for module in modules for weight in module.parameters())
