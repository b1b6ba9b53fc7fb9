"""Several processes (DistributedDataParallel, fully_shard) and activation checkpointing."""

import warnings

import pytest
import torch
from processes import WORLD, in_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import triton_lstm
from triton_lstm.dispatch import no_kernel_for

STEPS = 2


class Model(nn.Module):
    def __init__(self, lstm_class, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = lstm_class(3, 4, 2, bidirectional=True, **kwargs)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def ours(backend="triton"):
    return Model(triton_lstm.LSTM, backend=backend).double()


def converted_inside():
    model = DistributedDataParallel(Model(nn.LSTM).double())
    assert triton_lstm.convert(model, backend="triton").converted == ("module.lstm",)
    return model


def sharded(each: bool):
    model = ours()
    mesh = init_device_mesh("cpu", (WORLD,))
    if each:
        fully_shard(model.lstm, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPED = {
    "DistributedDataParallel": lambda: DistributedDataParallel(ours()),
    "gradients as bucket views": lambda: DistributedDataParallel(ours(), gradient_as_bucket_view=True),
    "converted inside the wrapper": converted_inside,
    "fully_shard of the model": lambda: sharded(False),
    "fully_shard of the LSTM too": lambda: sharded(True),
}


def batch():
    return torch.randn(3, 2 * WORLD, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def train(model, x):
    """Gradients and weights after some steps, by name without the wrapper's prefix."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    result = {}
    for name, parameter in model.named_parameters():
        for kind, tensor in (("gradient", parameter.grad), ("weight", parameter.detach())):
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            result[f"{kind} of {name.removeprefix('module.')}"] = whole.clone()
    return result


def work(rank):
    """One process: every wrapper on this process's share of the batch."""
    if reason := no_kernel_for("cpu", torch.float64):
        return str(reason)
    results = {}
    for name, wrapped in WRAPPED.items():
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            results[name] = (
                train(wrapped(), batch().chunk(WORLD, dim=1)[rank]),
                [str(w.message) for w in seen if issubclass(w.category, UserWarning)],
            )
    model = DistributedDataParallel(ours())
    with triton_lstm.record_gradients(model) as grads:
        train(model, batch().chunk(WORLD, dim=1)[rank])
    results["recorded"] = [(r.module, r.call, r.layer, r.direction, r.hidden) for r in grads]
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of every process, run on the CPU once for all tests."""
    return in_processes(work, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", WRAPPED)
def test_processes_train_as_one_on_the_whole_batch(name, results):
    expected = train(Model(nn.LSTM).double(), batch())
    for of_rank in results:
        got, _ = of_rank[name]
        assert list(got) == list(expected)
        for key, tensor in expected.items():
            torch.testing.assert_close(got[key], tensor, rtol=1e-9, atol=1e-12, msg=f"{name}: {key}")


def test_gradients_recorded_in_every_process(results):
    """Every process records its own share of the batch: the first step's are those of the whole batch, times WORLD."""
    model = ours(backend="torch")  # not every machine can interpret the kernels in this process
    with triton_lstm.record_gradients(model) as grads:
        train(model, batch())
    parts = [of_rank["recorded"] for of_rank in results]
    assert len(grads) == STEPS * 4 == len(parts[0])
    for record, *shares in zip(grads, *parts, strict=True):
        assert all(share[:4] == (f"module.{record.module}", *_place(record)) for share in shares)
        whole = torch.cat([share[4] for share in shares], 1) / WORLD
        torch.testing.assert_close(whole, record.hidden, rtol=1e-9, atol=1e-12)


def _place(record):
    return record.call, record.layer, record.direction


@pytest.mark.parametrize("name", list(WRAPPED)[:3])
def test_data_parallel_gives_no_warning(name, results):
    """Neither cuDNN's, of weights that are not one contiguous chunk, nor the reducer's, of gradients' strides."""
    assert [of_rank[name][1] for of_rank in results] == [[]] * WORLD


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_repeats_the_same_dropout(use_reentrant, device):
    """The gradients are those without it, and differ if the second run uses other random numbers."""
    module = triton_lstm.LSTM(3, 6, 3, dropout=0.5, bidirectional=True, backend="triton").to(device)
    x = torch.randn(4, 2, 3, device=device, requires_grad=True)

    def states_too(x):  # flat, since a reentrant checkpoint has no gradients for tensors in nested tuples
        y, (h_n, c_n) = module(x)
        return y, h_n, c_n

    def gradients(run):
        torch.manual_seed(7)
        x.grad = None
        module.zero_grad()
        sum(out.square().sum() for out in run(x)).backward()
        return [x.grad, *(parameter.grad for parameter in module.parameters())]

    def checkpointed(**kwargs):
        return gradients(lambda x: checkpoint(states_too, x, use_reentrant=use_reentrant, **kwargs))

    expected = gradients(states_too)
    assert all(torch.equal(a, b) for a, b in zip(checkpointed(), expected, strict=True))
    assert not torch.equal(checkpointed(preserve_rng_state=False)[0], expected[0])
