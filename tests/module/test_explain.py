"""explain: what it says of a call."""

import pytest
import torch
from torch import nn

import triton_lstm
from triton_lstm import explain
from triton_lstm.planning.devices import GPUS, file_name
from triton_lstm.planning.space import make_plan
from triton_lstm.tuning.table_file import Key, LayerTime, Tuned, update

H200 = GPUS["H200"]
X = torch.zeros(10, 64, 512, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def folder(tables_folder):
    return tables_folder


@pytest.fixture
def module():
    return triton_lstm.LSTM(512, 768, 2, bidirectional=True, dtype=torch.bfloat16)


def test_a_plan_and_its_parts(module, capsys):
    assert explain(module, X, gpu="H200") is None
    out = capsys.readouterr().out
    assert "LSTM(512, 768, num_layers=2, bidirectional=True), input (10, 64, 512), bfloat16 on NVIDIA H200" in out
    assert "Triton kernels, 4 time loops forward and 4 backward:" in out
    assert "nothing near H=768, B=64 is measured" in out
    for backward in (False, True):
        plan = make_plan(Key(backward, "bf16", 768, 64).on(H200, 2))
        assert plan.describe(768) in out
    assert "us a step (exchange" in out
    assert len(out.splitlines()) <= 12


def test_documents_are_a_batch_where_they_are_known(module, capsys):
    stream = X[:, :1]
    explain(module, stream, cu_seqlens=[0, 2, 2, 7, 10], gpu="H200")
    out = capsys.readouterr().out
    assert "3 documents, side by side as a packed batch" in out
    explain(module, stream, cu_seqlens=torch.tensor([0, 2, 10], device="meta"), gpu="H200")
    assert "documents" not in capsys.readouterr().out
    explain(module, stream, cu_seqlens=[0, 0, 10], gpu="H200")
    assert "documents" not in capsys.readouterr().out
    both = dict(cu_seqlens=[0, 10], resets=stream[..., 0] > 0)
    for wrong in (dict(cu_seqlens=[10]), dict(cu_seqlens=[0, 3, 11]), both):
        with pytest.raises(ValueError, match="cu_seqlens"):
            explain(module, stream, **wrong)
    with pytest.raises(ValueError, match="a batch of 64"):
        explain(module, X, cu_seqlens=[0, 10])


def test_with_resets_the_faster_path_is_not_looked_up(folder, capsys):
    module = triton_lstm.LSTM(512, 768, dtype=torch.bfloat16).requires_grad_(False)
    faster = LayerTime("inference", "bf16", 768, 64, 9.0, 1.0)
    key = Key(False, "bf16", 768, 64)
    update(folder / file_name(H200.name), "x", Tuned(key, make_plan(key.on(H200)), 1.25, 1.5, "today"), faster)
    explain(module, X, gpu="H200")
    assert "it was measured faster there" in capsys.readouterr().out
    explain(module, X, resets=torch.zeros(X.shape[:-1], dtype=torch.bool), gpu="H200")
    out = capsys.readouterr().out
    assert "Triton kernels" in out and "segments begin where resets say" in out
    with pytest.raises(ValueError, match="without its features"):
        explain(module, X, resets=torch.zeros(3, dtype=torch.bool), gpu="H200")


def test_how_the_flag_exchange_loads(capsys):
    explain(triton_lstm.LSTM(512, 64, dtype=torch.bfloat16), X, gpu="A100")
    assert "rows are loaded 16 bytes at a time, missing ones again by element" in capsys.readouterr().out


def test_what_is_tuned_and_measured(module, folder, capsys):
    key = Key(False, "bf16", 768, 64)
    plan = make_plan(key.on(H200))
    layer = LayerTime("inference", "bf16", 768, 64, 2.5, 2.0)
    update(folder / file_name(H200.name), "x", Tuned(key, plan, 1.25, 1.5, "today"), layer)
    explain(module, X, gpu="H200")
    out = capsys.readouterr().out
    assert "tuned (measured): 1.25 us a step at H=768, B=64, 1.50 as planned; today" in out
    assert "inference of a whole layer, measured: 2.50 us a step, SLOWER than PyTorch's 2.00" in out
    explain(triton_lstm.LSTM(512, 700, dtype=torch.bfloat16), X, gpu="H200")
    assert "tuned (a neighbour's)" in capsys.readouterr().out


def test_why_pytorchs_path_is_taken(module, capsys):
    explain(triton_lstm.LSTM(3, 4, backend="torch"), torch.zeros(2, 3))
    assert "PyTorch's own LSTM: PyTorch's path was asked for" in capsys.readouterr().out
    explain(triton_lstm.LSTM(3, 4, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64), gpu="L4")
    assert "no kernel for torch.float64 on a GPU" in capsys.readouterr().out


def test_packed_rows_and_both_directions(capsys):
    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(4, 48), torch.zeros(2, 48)])
    for hidden_size, says in ((64, "both directions of time in one launch"), (1024, "one direction of time after")):
        explain(triton_lstm.LSTM(48, hidden_size, bidirectional=True), packed, gpu="L4")
        out = capsys.readouterr().out
        assert "input (6, 48)" in out and says in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's plan")
def test_in_the_interpreter(capsys, interpreter):
    explain(triton_lstm.LSTM(3, 33), torch.zeros(2, 5, 3))
    out = capsys.readouterr().out
    assert "on cpu" in out and "for tests, not for speed" in out and "no exchange" in out


def test_batch_first_and_unbatched_and_autocast(capsys):
    explain(triton_lstm.LSTM(3, 512, batch_first=True), torch.zeros(2, 50, 3), gpu="H100")
    assert "B=2" in capsys.readouterr().out
    explain(triton_lstm.LSTM(3, 512), torch.zeros(50, 3), gpu="H100")
    assert "B=1" in capsys.readouterr().out
    with torch.autocast("cpu", torch.bfloat16):
        explain(triton_lstm.LSTM(3, 512), torch.zeros(50, 2, 3), gpu="H100")
    assert "(bf16)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, kwargs, error, says",
    [
        ((torch.nn.LSTM(3, 4), torch.zeros(2, 3)), {}, TypeError, "takes a triton_lstm.LSTM, got torch.nn.LSTM"),
        ((triton_lstm.LSTM(3, 4), [1, 2]), {}, TypeError, "a tensor or PackedSequence, got list"),
        ((triton_lstm.LSTM(3, 4), torch.zeros(2, 5)), {}, ValueError, "with 3 features"),
        ((triton_lstm.LSTM(3, 4), torch.zeros(3)), {}, ValueError, "2-D or 3-D"),
        ((triton_lstm.LSTM(3, 4), torch.zeros(2, 3)), {"gpu": "Z80"}, ValueError, "There are A100"),
    ],
    ids=lambda value: "",
)
def test_bad_input(args, kwargs, error, says):
    with pytest.raises(error, match=says):
        explain(*args, **kwargs)


def test_without_gradients_there_is_no_backward_pass(capsys):
    with torch.no_grad():
        explain(triton_lstm.LSTM(3, 512), torch.zeros(2, 5, 3), gpu="H100")
    out = capsys.readouterr().out
    assert "forward (" in out and "backward" not in out


@pytest.mark.parametrize("allowed, name", [(True, "tf32"), (False, "fp32")])
def test_float32_follows_the_switch(allowed, name, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    explain(triton_lstm.LSTM(3, 512), torch.zeros(2, 5, 3), gpu="NVIDIA h100 80GB HBM3")
    assert f"forward ({name})" in capsys.readouterr().out
    explain(triton_lstm.LSTM(3, 512), torch.zeros(2, 5, 3), gpu="mi300x")
    assert "forward (fp32)" in capsys.readouterr().out


def test_what_would_raise_is_no_kernel(capsys):
    module = triton_lstm.LSTM(3, 4, dtype=torch.float64, backend="triton")
    explain(module, torch.zeros(2, 5, 3, dtype=torch.float64), gpu="H100")
    assert (
        'an error: backend="triton" cannot run this call: no kernel for torch.float64 on a GPU'
        in capsys.readouterr().out
    )
    for x in (torch.zeros(2, 5, 3), torch.zeros(0, 5, 3, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"has dtype|2-D or 3-D"):
            explain(module, x, gpu="H100")


def test_a_call_may_be_pasted_and_shapes_are_enough(capsys):
    h = torch.zeros(1, 5, 4, device="meta")
    explain(triton_lstm.LSTM(3, 4, device="meta"), torch.zeros(2, 5, 3, device="meta"), (h, h))
    assert "no kernel for meta tensors" in capsys.readouterr().out


def test_what_a_model_says_stands_beside_the_prediction(module, capsys):
    asked = []

    def model(problem, plan):
        asked.append((problem, plan))
        return f"{len(asked)} us a step"

    explain(module, X, gpu="H200", model=model)
    lines = capsys.readouterr().out.splitlines()
    for n, backward in enumerate((False, True), 1):
        problem = Key(backward, "bf16", 768, 64).on(H200, 2)
        assert asked[n - 1] == (problem, make_plan(problem))
        k = lines.index(f"  modelled: {n} us a step")
        assert lines[k - 1].startswith("  predicted: ")
    explain(module, X, gpu="H200")
    assert "modelled" not in capsys.readouterr().out


def test_documents_are_no_packed_rows():
    packed = nn.utils.rnn.pack_sequence([torch.zeros(3, 4)])
    with pytest.raises(ValueError, match="cu_seqlens goes with a batch of one sequence, and not with packed rows"):
        explain(triton_lstm.LSTM(4, 6), packed, cu_seqlens=torch.tensor([0, 1, 3]))
