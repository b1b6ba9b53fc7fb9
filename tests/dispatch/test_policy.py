"""backend="auto" where a tuned table says that PyTorch's path is faster; and when a first call may tune."""

import pytest
import torch

from triton_lstm import dispatch, settings
from triton_lstm.planning.devices import GPUS, file_name
from triton_lstm.tuning.choice import forget
from triton_lstm.tuning.table_file import LayerTime, update

H200 = GPUS["H200"]
X = type("X", (), dict(device=torch.device("cuda", 0), dtype=torch.bfloat16, requires_grad=False))()


@pytest.fixture(autouse=True)
def table(tables_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: H200.name)
    monkeypatch.setattr("triton_lstm.dispatch.precision_name", lambda dtype, device: "bf16")
    monkeypatch.delenv("TRITON_LSTM_BACKEND", raising=False)
    layers = [LayerTime("inference", "bf16", 24, B, 2.0, torch_us) for B, torch_us in ((16, 1.0), (32, 1.95))]
    update(tables_folder / file_name(H200.name), "x", *layers)


def reason(backend=None, batch=16, hidden=24, weights=4):
    params = [torch.zeros(4 * hidden, hidden, requires_grad=True)] * weights
    route = dispatch.decide_for(H200.name, X, X.dtype, backend, batch=batch, params=params, has_biases=True)
    here = dispatch.why_torch_is_faster(None, X, batch, params, True)
    assert route.why_torch == (None if backend else here)
    assert route.kernels == (route.why_torch is None)
    return None if route.why_torch is None else str(route.why_torch)


def test_a_call_without_gradients_goes_there():
    with torch.no_grad():
        assert "1.00 us a step, 2.00 in the kernels" in reason()
        assert reason(batch=7) is not None  # of the same bucket


def test_only_where_that_is_known_and_both_do_the_same(monkeypatch):
    assert reason() is None  # a gradient may be asked for
    with torch.no_grad():
        assert reason("triton") is None
        assert reason(batch=32) is None  # within the noise
        assert reason(batch=64) is None and reason(hidden=40) is None  # not measured
        assert reason(weights=8) is None  # two layers
    with torch.enable_grad():
        state = torch.zeros(1, 16, 24, requires_grad=True)
        frozen = [torch.zeros(96, 24)] * 4
        for hx, expected in (((state, state), True), ((state.detach(), state.detach()), False)):
            assert (dispatch.why_torch_is_faster(None, X, 16, frozen, True, hx) is None) == expected
    with torch.no_grad():
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        assert reason() is None


@pytest.mark.parametrize(
    "value, device, capturing, expected",
    [
        (None, "cuda", False, False),
        ("0", "cuda", False, False),
        ("1", "cpu", False, False),
        ("1", "cuda", True, False),
        ("1", "cuda", False, True),
    ],
)
def test_a_first_call_tunes_only_if_it_may(value, device, capturing, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.delenv("TRITON_LSTM_AUTOTUNE", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_LSTM_AUTOTUNE", value)
    assert settings.wants_tuning(torch.device(device)) == expected


def test_a_call_off_a_gpu_reads_no_table_and_tunes_nothing(monkeypatch):
    import triton_lstm
    import triton_lstm.tuning.measure

    forget()
    monkeypatch.setattr(
        "triton_lstm.tuning.first_call.tune_now", lambda key, device: pytest.fail("something was tuned")
    )
    monkeypatch.setenv("TRITON_LSTM_AUTOTUNE", "1")
    monkeypatch.setattr("triton_lstm.tuning.tables.read", lambda path: pytest.fail("a table was read"))
    triton_lstm.LSTM(3, 4)(torch.zeros(2, 1, 3))


def test_explain_says_so_for_another_machine(capsys):
    import triton_lstm

    module, x = triton_lstm.LSTM(24, 24, dtype=torch.bfloat16), torch.zeros(5, 16, 24, dtype=torch.bfloat16)
    with torch.no_grad():
        triton_lstm.explain(module, x, gpu="H200")
    assert "PyTorch's own LSTM: it was measured faster there" in capsys.readouterr().out
    triton_lstm.explain(module, x, gpu="H200")  # with gradients the kernels stay
    assert "backward (bf16)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "device, dtype, reason",
    [
        ("cuda", torch.float16, None),
        ("cuda", torch.float64, dispatch.Reason.DTYPE_ON_A_GPU.why(torch.float64)),
        ("mps", torch.float32, dispatch.Reason.DEVICE.why("mps")),
    ],
)
def test_devices_and_dtypes_of_kernels(device, dtype, reason):
    pytest.importorskip("triton")
    assert dispatch._no_kernel_for.__wrapped__(device, dtype, False) == reason


def test_older_tritons_interpret_no_newer_numpy(monkeypatch):
    numpy, triton = pytest.importorskip("numpy"), pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(numpy, "__version__", "2.4.1")
    expected = dispatch.Reason.NUMPY.why("3.6.0", "2.4.1")
    assert dispatch._no_kernel_for.__wrapped__("cpu", torch.float32, True) == expected


def test_no_first_call_tunes_inside_of_a_transform(monkeypatch):
    monkeypatch.setenv("TRITON_LSTM_AUTOTUNE", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    seen = []

    def loss(x):
        seen.append(settings.wants_tuning(torch.device("cuda")))
        return x.sum()

    torch.func.grad(loss)(torch.zeros(2))
    loss(torch.zeros(2))
    assert seen == [False, True]
