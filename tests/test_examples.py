"""The examples run, and the features that they use are correct."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import packed_documents
import pytest
import torch
from torch import nn

import triton_lstm

EXAMPLES = Path(__file__).parents[1] / "examples"


def lines_of(name: str, steps: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, "--steps", str(steps)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_wgan_gp_runs():
    lines = lines_of("wgan_gp.py", 2)
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2"]
    for line in lines:
        loss, penalty = map(float, re.findall(r"critic loss (\S+), penalty (\S+)", line)[0])
        assert 0 < penalty < 2 and abs(loss) < 20


@pytest.mark.parametrize("kwargs", [{}, dict(num_layers=2, bidirectional=True)], ids=str)
def test_the_weight_gradients_of_a_gradient_penalty_are_those_of_nn_lstm(kwargs, device):
    """In float64 where the kernels have it; nn.LSTM on the CPU, since cuDNN's has no double backward."""
    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    twin = nn.LSTM(3, 4, **kwargs).double()
    module = triton_lstm.LSTM(3, 4, **kwargs, backend="triton")
    module.load_state_dict(twin.state_dict())
    module.to(device, torch.float32 if on_gpu else torch.float64)
    data = torch.randn(5, 2, 3, dtype=torch.float64)

    def gradients(module):
        x = data.to(module.weight_hh_l0).requires_grad_()
        out = module(x)[0]
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (out.pow(2).sum() + 10 * g.pow(2).sum()).backward()
        return {"x": x.grad} | {name: parameter.grad for name, parameter in module.named_parameters()}

    got, expected = gradients(module), gradients(twin)
    tolerance = dict(rtol=2e-2, atol=2e-3) if on_gpu else dict(rtol=1e-9, atol=1e-12)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name].cpu().double(), tensor, **tolerance, msg=name)


def test_packed_documents_learns():
    lines = lines_of("packed_documents.py", 5)
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 5"]
    first, last = (float(re.findall(r"loss (\S+) over", line)[0]) for line in lines)
    assert 0 < last < first - 0.2


def test_targets_do_not_cross_documents():
    documents = packed_documents.DOCUMENTS[:3]
    batch = packed_documents.pack(documents, torch.device("cpu"))
    lengths = batch.cu_seqlens.diff().tolist()

    def texts(codes: torch.Tensor) -> list[str]:
        return ["".join(packed_documents.CHARACTERS[i] for i in part) for part in codes.squeeze(1).split(lengths)]

    assert texts(batch.inputs) == ["\n" + document for document in documents]
    assert texts(batch.targets) == [document + "\n" for document in documents]


@pytest.mark.parametrize("given", ["cu_seqlens", "resets"])
def test_a_pack_gives_what_its_documents_give_alone(given, device, precise, monkeypatch):
    monkeypatch.setenv("TRITON_LSTM_BACKEND", "triton")
    dtype, tolerance = precise
    torch.manual_seed(0)
    model = packed_documents.CharacterModel().to(device, dtype)
    twin = copy.deepcopy(model)
    triton_lstm.convert(twin, back=True)
    assert type(twin.lstm) is nn.LSTM
    batch = packed_documents.pack(packed_documents.DOCUMENTS[:3], device)

    def alone(inputs: torch.Tensor) -> torch.Tensor:
        return twin.head(twin.lstm(twin.embedding(inputs))[0])

    def gradients(model: nn.Module, logits: torch.Tensor) -> dict[str, torch.Tensor | None]:
        nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    if given == "cu_seqlens":
        logits = model(batch.inputs, batch.cu_seqlens)
    else:
        resets = torch.zeros(batch.inputs.shape, dtype=torch.bool, device=device)
        resets[batch.cu_seqlens[:-1].long()] = True
        logits = model.head(model.lstm(model.embedding(batch.inputs), resets=resets)[0])
    expected = torch.cat([alone(inputs) for inputs in batch.inputs.split(batch.cu_seqlens.diff().tolist())])
    torch.testing.assert_close(logits, expected, **tolerance)
    torch.testing.assert_close(gradients(model, logits), gradients(twin, expected), **tolerance)
    assert (alone(batch.inputs) - logits).abs().max() > 1e-2  # as one document
