"""The operators that a layer is in a graph: PyTorch's rules for them, their fake results, and exported programs."""

import io
import itertools
import os
import subprocess
import sys

import pytest
import torch
from child import python_path

import triton_lstm
import triton_lstm.operator.library
from triton_lstm.core.packing import starts_and_lengths
from triton_lstm.operator.arguments import LayerArguments
from triton_lstm.operator.layer import layer_forward
from triton_lstm.system.installed import release

FEATURES, H = 7, 6


@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_any_number_of_steps_and_rows(strict, device):
    """And loaded again, where triton_lstm.operator.library has been imported."""
    if strict and release(torch.__version__) < (2, 10):
        pytest.skip("PyTorch 2.9 does not export nn.LSTM's checks of states strictly")
    torch.manual_seed(0)
    kwargs = dict(num_layers=2, bidirectional=True, proj_size=2, batch_first=True)
    module = triton_lstm.LSTM(FEATURES, H, **kwargs, backend="triton").to(device)

    def arguments(steps, batch):
        h0, c0 = (torch.randn(4, batch, n, device=device) for n in (2, H))
        return torch.randn(batch, steps, FEATURES, device=device), (h0, c0)

    steps, batch = torch.export.Dim("steps", min=2, max=64), torch.export.Dim("batch", min=2, max=64)
    shapes = {"input": {0: batch, 1: steps}, "hx": ({1: batch}, {1: batch})}
    program = torch.export.export(module, arguments(3, 2), dynamic_shapes=shapes, strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for loaded in (program.module(), torch.export.load(buffer).module()):
        for sizes in [(3, 2), (5, 4)]:
            x, hx = arguments(*sizes)
            torch.testing.assert_close(loaded(x, hx), module(x, hx))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_one_import_loads_every_exported_program(backend, device, tmp_path):
    """In a process that has never made a graph."""
    torch.manual_seed(0)
    module = triton_lstm.LSTM(FEATURES, H, backend=backend).to(device)
    x = torch.randn(3, 2, FEATURES, device=device)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "lstm.pt2")
    torch.save((x, module(x)[0].detach()), tmp_path / "expected.pt")
    code = """
import torch
import triton_lstm.operator.library
x, expected = torch.load("expected.pt")
torch.testing.assert_close(torch.export.load("lstm.pt2").module()(x)[0], expected)
"""
    variables = os.environ | {"PYTHONPATH": python_path()}
    ran = subprocess.run([sys.executable, "-c", code], env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_an_interpreted_program_where_nothing_interprets_says_what_to_do(interpreter, tmp_path):
    module = triton_lstm.LSTM(FEATURES, H, backend="triton")
    torch.export.save(torch.export.export(module, (torch.randn(3, 2, FEATURES),)), tmp_path / "lstm.pt2")
    code = "import torch, triton_lstm.operator.library as library\n"
    code += f"torch.export.load('lstm.pt2').module()(torch.zeros(3, 2, {FEATURES}))"
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": python_path()}
    ran = subprocess.run([sys.executable, "-c", code], env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 1 and "the kernels cannot run on cpu here: set TRITON_INTERPRET=1" in ran.stderr


def layer_arguments(directions=1, packed=False, sparse=False, dtype=torch.float32, device="cpu"):
    """All arguments of a layer; `sparse`: None where they may be."""
    resets = None if sparse else torch.ones(5 if packed else (3, 2), dtype=torch.bool, device=device)
    torch.manual_seed(0)
    rows, batch = ((5,), 2) if packed else ((3, 2), 2)
    state, gates = (directions, batch, H), directions * 4 * H
    shapes = [(*rows, FEATURES), state, state, (gates, FEATURES), (gates, H), (gates,), (gates,), (batch, gates)]
    tensors = [
        None if sparse and k in (1, 2, 5, 6, 7) else torch.randn(s).to(device, dtype) for k, s in enumerate(shapes)
    ]
    index = starts_and_lengths(torch.tensor([2, 2, 1]), torch.device(device)) if packed else (None, None)
    return LayerArguments(*tensors, *index, resets)


@pytest.mark.parametrize(
    ("directions", "packed", "sparse"), [(1, False, False), (1, True, True), (2, False, True), (2, True, False)]
)
def test_operators_keep_the_rules_of_operators(directions, packed, sparse, device):
    """Schema, fake tensors, autograd registration and dynamic shapes of both."""
    arguments = layer_arguments(directions, packed, sparse, device=device)
    leaves = [t.requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t for t in arguments]
    torch.library.opcheck(torch.ops.triton_lstm.layer_forward.default, (*leaves, True, True))
    with torch.no_grad():
        y, h_n, c_n, gates, c = layer_forward(LayerArguments(*arguments), save_gates=True, save_c=True)
        arguments = layer_arguments(directions, packed, sparse, device=device)
    cotangents = [None if sparse and k else torch.ones_like(t) for k, t in enumerate((y, h_n, c_n, gates, c))]
    saved = (*cotangents, *arguments, y, None if sparse else gates, c)
    torch.library.opcheck(torch.ops.triton_lstm.layer_backward.default, saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_fake_results_are_laid_out_as_real_ones(packed, dtype, device):
    arguments = layer_arguments(2, packed, dtype=dtype, device=device)

    def layouts(function):
        results = [function(*arguments, *save) for save in itertools.product([False, True], repeat=2)]
        saved = arguments, *results[-1]
        cotangents = [torch.ones_like(t) for t in saved[1:]]
        results.append(torch.ops.triton_lstm.layer_backward(*cotangents, *arguments, saved[1], *saved[4:]))
        return [[(t.shape, t.stride(), t.dtype, t.device) for t in result] for result in results]

    real = layouts(torch.ops.triton_lstm.layer_forward)
    with torch._subclasses.FakeTensorMode() as mode:
        arguments = [None if t is None else mode.from_tensor(t) for t in arguments]
        assert layouts(torch.ops.triton_lstm.layer_forward) == real
