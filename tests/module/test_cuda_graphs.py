"""Capturing a module in a CUDA graph, and what cannot be captured."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import triton_lstm
import triton_lstm.kernels.launch as launch
from triton_lstm.core.packing import starts_and_lengths
from triton_lstm.core.segments import segments_of

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
CLOSE = dict(rtol=1e-4, atol=1e-4)  # a GEMM may take another algorithm in a graph
KWARGS = [{}, dict(num_layers=2, bidirectional=True, batch_first=True), dict(proj_size=32, recompute=True)]


def module_and_input(**kwargs):
    torch.manual_seed(0)
    return triton_lstm.LSTM(48, 64, **kwargs, backend="triton").to("cuda"), torch.randn(9, 5, 48, device="cuda")


def capture(function):
    """A graph of `function`, after a call outside, and what it returned."""
    stream = torch.cuda.Stream()  # autograd remembers the streams of leaves, as PyTorch's manual says
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        return graph, function()


@needs_gpu
@pytest.mark.parametrize("kwargs", KWARGS)
def test_inference_is_captured(kwargs):
    """After one call outside, which compiles the kernels."""
    module, x = module_and_input(**kwargs)
    with torch.no_grad():
        module(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, (h_n, c_n) = module(x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            torch.testing.assert_close((y, (h_n, c_n)), module(x), **CLOSE)


@needs_gpu
@pytest.mark.parametrize("kwargs", KWARGS)
def test_training_is_captured(kwargs):
    module, x = module_and_input(**kwargs)
    x.requires_grad_()
    inputs = [x, *module.parameters()]

    def gradients():
        y, (h_n, c_n) = module(x)
        return torch.autograd.grad(y.square().sum() + h_n.sin().sum() + c_n.cos().sum(), inputs)

    graph, captured = capture(gradients)
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(captured, gradients(), **CLOSE)


@needs_gpu
@pytest.mark.parametrize("how", ["resets", "cu_seqlens"])
def test_a_replay_reads_its_segments_anew(how):
    module, _ = module_and_input(num_layers=2, bidirectional=True)
    x = torch.randn(9, 1 if how == "cu_seqlens" else 5, 48, device="cuda", requires_grad=True)
    given = torch.zeros(9, 5, dtype=torch.bool) if how == "resets" else torch.tensor([0, 9, 9], dtype=torch.int32)
    given = given.to("cuda")

    def gradients():
        return torch.autograd.grad(module(x, **{how: given})[0].square().sum(), [x, *module.parameters()])

    graph, captured = capture(gradients)
    for k in range(3):
        given.copy_(torch.rand(9, 5) < 0.3 if how == "resets" else torch.tensor([0, 2 + k, 9]))
        graph.replay()
        torch.testing.assert_close(captured, gradients(), **CLOSE)


@needs_gpu
def test_graphed_callable():
    module, x = module_and_input(num_layers=2)
    graphed = torch.cuda.make_graphed_callables(triton_lstm.LSTM(48, 64, 2, backend="triton").to("cuda"), (x,))
    graphed.load_state_dict(module.state_dict())
    for _ in range(3):
        x = torch.randn_like(x)
        y, (h_n, c_n) = graphed(x)
        torch.testing.assert_close((y, (h_n, c_n)), module(x), **CLOSE)
        graphed.zero_grad()  # set to None: a replay writes into the very tensors that .grad are
        module.zero_grad()
        (y.square().sum() + c_n.sum()).backward()
        expected, (_, c_n) = module(x)
        (expected.square().sum() + c_n.sum()).backward()
        for p, q in zip(graphed.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, **CLOSE)


@needs_gpu
def test_compiled_into_graphs():
    module, x = module_and_input(num_layers=2, bidirectional=True)
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = torch.randn_like(x)
        torch.compiler.cudagraph_mark_step_begin()
        module.zero_grad()
        compiled(x)[0].square().sum().backward()
        got = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        module(x)[0].square().sum().backward()
        torch.testing.assert_close(got, [p.grad for p in module.parameters()], **CLOSE)


@needs_gpu
@pytest.mark.parametrize("how", ["packed", "lengths", "cu_seqlens on the CPU", "resets on PyTorch's path"])
def test_packed_rows_are_not_captured(how):
    module, x = module_and_input()
    packed = pack_sequence([torch.randn(n, 48, device="cuda") for n in (4, 2)])
    refused = pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph")
    with torch.no_grad(), refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        if how == "packed":
            module(packed)
        elif how == "lengths":
            module(x, lengths=[9, 1, 2, 3, 4])
        elif how == "cu_seqlens on the CPU":
            module(x[:, :1], cu_seqlens=[0, 2, 9])
        else:
            module.backend = "torch"
            module(x, resets=x[..., 0] > 0)
    assert module(x)[0].isfinite().all()


def test_unsupported_captures_fail_before_anything_runs(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="packed input and lengths cannot be captured in a CUDA graph"):
        starts_and_lengths(torch.tensor([2, 1]), cuda)
    with pytest.raises(RuntimeError, match="cu_seqlens on the CPU and resets on PyTorch's path"):
        segments_of(torch.zeros(2, 1, dtype=torch.bool), None, cuda)
    starts_and_lengths(torch.tensor([2, 1]), torch.device("cpu"))
    assert launch._limit_for(cuda) == 0
    monkeypatch.setenv("TRITON_LSTM_SPIN_LIMIT", "9")
    with pytest.raises(RuntimeError, match="unset it to capture one"):
        launch._limit_for(cuda)
