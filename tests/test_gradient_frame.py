"""Recorded gradients as a frame, in words, as a picture, in TensorBoard and from the command line."""

import math
import os
import sys

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import triton_lstm
from triton_lstm import cli

T, B, H = 6, 3, 5
PNG, SVG = b"\x89PNG", b"<?xml"


def grads_of(loss, device="cpu", steps=T, x=None, scale=1.0, **kwargs):
    torch.manual_seed(0)
    lstm = triton_lstm.LSTM(4, H, **kwargs).to(device)
    with torch.no_grad():
        for weight in lstm.parameters():
            weight *= scale
    reduce = "norm" if steps == "norm" else None
    x = torch.randn(T if reduce else steps, B, 4).to(device) if x is None else x
    with triton_lstm.record_gradients(lstm, reduce=reduce) as grads:
        loss(lstm(x)[0]).backward()
    return grads


@pytest.fixture(scope="module")
def grads(device):
    return grads_of(lambda y: y[-1].sum(), device, num_layers=2, bidirectional=True)


def test_frame_is_tidy(grads):
    frame = grads.frame()
    places = ["module", "call", "backward", "layer", "direction", "quantity", "step"]
    assert [*frame.columns] == [
        *places[:5],
        "step",
        "quantity",
        "norm",
        "mean",
        "max",
        "zeros",
        "nonfinite",
        "saturated",
    ]
    assert not frame.duplicated(places).any()
    assert len(frame) == 4 * (8 * T + 2)
    assert set(frame["quantity"]) == {"input", "output", "hidden", "cell", "i", "f", "g", "o", "h0", "c0"}
    assert frame[frame["step"] == -1]["quantity"].unique().tolist() == ["h0", "c0"]
    assert frame["saturated"].notna().equals(frame["quantity"].isin(["i", "f", "g", "o"]))


def test_frame_has_the_numbers_of_the_tensors(grads):
    frame = grads.frame().set_index(["layer", "direction", "quantity", "step"])
    for record in grads:
        parts = dict(zip("ifgo", record.gates, strict=False))
        parts |= {name: getattr(record, name) for name in ("input", "output", "hidden", "cell")}
        for name, tensor in parts.items():
            for t, value in enumerate(tensor.double().cpu()):
                row = frame.loc[record.layer, record.direction, name, t]
                assert math.isclose(row["norm"], value.norm().item(), rel_tol=1e-6, abs_tol=1e-30)
                assert math.isclose(row["mean"], value.mean().item(), rel_tol=1e-6, abs_tol=1e-9)
                assert math.isclose(row["max"], value.abs().max().item(), rel_tol=1e-6)
                assert row["zeros"] == (value == 0).double().mean().item() and row["nonfinite"] == 0


def test_frame_of_packed_rows_counts_what_is_there(device):
    x = pack_padded_sequence(torch.randn(T, B, 4, device=device), [T, 3, 1])
    grads = grads_of(lambda y: y.data.sum(), device, x=x)
    output = grads.frame().query("quantity == 'output'")
    assert output["norm"].round(5).tolist() == [round(math.sqrt(n * H), 5) for n in (3, 2, 2, 1, 1, 1)]
    assert (output["mean"] == 1).all() and (output["max"] == 1).all() and (output["zeros"] == 0).all()


def test_vanishing_gradients_have_a_norm_where_their_squares_would_have_none(device):
    """1e-30 squared is nothing in float32."""
    for steps in (T, "norm"):
        grads = grads_of(lambda y: (y[-1] * 1e-30).sum(), device, steps)
        norm = grads.frame().query("quantity == 'output'")["norm"].iloc[-1]
        assert math.isclose(norm, 1e-30 * math.sqrt(B * H), rel_tol=1e-6)
        assert grads.frame().query("quantity == 'hidden'")["norm"].gt(0).all()


def test_summary_says_how_far_back_the_gradient_reaches(device):
    grads = grads_of(lambda y: y[-1].sum(), device, steps=40)
    hidden = grads.hidden.double().flatten(1).norm(dim=1)
    faded = max(t for t in range(40) if hidden[t] < 0.01 * hidden.max())
    assert (
        f"largest at step 39 ({hidden[39]:.3g}); it falls under 1% of that {39 - faded} steps on, at step {faded}"
        in (grads.summary())
    )
    assert "NaN or infinity: none" in grads.summary() and "saturated gates: hardly any" in grads.summary()


def test_summary_of_the_reverse_direction_looks_the_other_way(device):
    grads = grads_of(lambda y: y[0].sum(), device, steps=40, bidirectional=True).select(direction="reverse")
    hidden = grads.hidden.double().flatten(1).norm(dim=1)
    faded = min(t for t in range(40) if hidden[t] < 0.01 * hidden.max())
    assert (
        f"at step 0 ({hidden[0]:.3g}); it falls under 1% of that {faded} steps on, at step {faded}" in grads.summary()
    )


def test_summary_of_a_growing_gradient(device):
    grads = grads_of(lambda y: y[-1].sum() * 1e-3 + y[0].sum(), device)
    assert (
        "largest at step 0" in grads.summary() and "times what it is at step 5: going back it grows" in grads.summary()
    )
    assert "there its way ends" in grads.summary()


def test_summary_of_a_gradient_that_reaches_the_end(device):
    assert "; it reaches step 0, 2 steps on, with " in grads_of(lambda y: y[-1].sum(), device, steps=3).summary()


@pytest.mark.parametrize("steps", [T, "norm"])
def test_summary_finds_the_first_nan(steps, device):
    grads = grads_of(lambda y: y[-1].sum() + (y[2, 0] * float("inf")).sum(), device, steps, num_layers=2)
    above, below = (grads.select(layer=layer).summary() for layer in (1, 0))
    assert "first at step 2 in output (0.33 of its values); it came from the loss or from the layers above" in above
    assert "first at step 2 in output" in below
    frame = grads.frame().query("quantity == 'hidden' and layer == 1").set_index("step")
    assert frame["nonfinite"].gt(0).tolist() == [True] * 3 + [False] * 3
    assert frame["norm"].isna()[0] and frame["max"].isna()[0]


def test_summary_of_a_nan_that_another_way_brought(device):
    """Through h_n, or through the other direction's share of the input's gradient."""
    lstm = triton_lstm.LSTM(4, H, bidirectional=True).to(device)
    x = torch.randn(T, B, 4, device=device)
    with triton_lstm.record_gradients(lstm) as grads:
        h_n = lstm(x)[1][0]
        (h_n[0] * float("nan")).sum().backward()
    forward, reverse = (grads.select(direction=direction).summary() for direction in ("forward", "reverse"))
    assert (
        f"first at step {T - 1} in hidden (1 of its values); it came from the loss of h_n or c_n, or arose here"
        in forward
    )
    assert "in input (1 of its values); both directions share the input" in reverse


def test_summary_of_an_overflow_inside_the_layer(device):
    """Finite from above; too large for the numbers on its way back."""
    grads = grads_of(lambda y: (y[-1] * 1e38).sum(), device, scale=30)
    assert "it arose here" in grads.summary()


def test_summary_of_saturated_gates(device):
    grads = grads_of(lambda y: y.sum(), device, scale=100)
    line = next(line for line in grads.summary().splitlines() if "saturated" in line)
    shares = [int(part.split()[-1].rstrip("%")) for part in line.split(": ")[1].split(", ")]
    assert len(shares) == 4 and all(80 < share <= 100 for share in shares)


def test_summary_without_any_gradient(device):
    assert "gradient: none at any step" in grads_of(lambda y: (y * 0).sum(), device).summary()
    assert "gradient: finite at no step" in grads_of(lambda y: (y * float("nan")).sum(), device).summary()


@pytest.mark.parametrize("steps", [1, 7, 2000])
def test_plot(steps, tmp_path):
    grads = grads_of(lambda y: y[-1].sum(), steps=steps, num_layers=2, bidirectional=True, backend="torch")
    for name, magic in (("out.png", PNG), ("out.SVG", SVG)):
        figure = grads.plot(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(magic)
    lines, layers, gates = figure.axes[:3]
    assert len(lines.lines) >= 4 and lines.get_legend_handles_labels()[1][1] == "layer 0 reverse"
    assert layers.images[0].get_array().shape == (4, steps) and gates.images[0].get_array().shape == (16, steps)
    norm = grads.select(layer=1, direction="forward").hidden.double().flatten(1).norm(dim=1)
    shown = layers.images[0].get_array()[2]
    assert math.isclose(shown[-1], math.log10(norm[-1]), rel_tol=1e-6)
    assert all(axes.get_xlim() == (-0.5, steps - 0.5) for axes in (lines, layers, gates))


@pytest.mark.parametrize("factor", [0.0, float("nan"), float("inf")])
def test_plot_of_what_has_no_logarithm(factor, tmp_path):
    grads = grads_of(lambda y: (y * factor).sum(), backend="torch")
    grads.plot(tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_plot_says_how_many_of_many(device):
    lstm = triton_lstm.LSTM(4, H, backend="torch").to(device)
    with triton_lstm.record_gradients(lstm) as grads:
        for steps in range(1, 31):
            lstm(torch.randn(steps, B, 4, device=device))[0].sum().backward()
    figure = grads.plot()
    assert "24 of 30" in figure.get_suptitle() and figure.axes[1].get_yticklabels()[3].get_text() == "call 3 layer 0"


def test_plot_to_another_ending(grads, tmp_path):
    with pytest.raises(ValueError, match=r"a picture is saved as .png or .svg, not as '.*out.bmp'"):
        grads.plot(tmp_path / "out.bmp")


@pytest.mark.parametrize("package, call", [("pandas", "frame"), ("matplotlib.figure", "plot")])
def test_packages_that_are_not_there(package, call, grads, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{call}\(\) needs {package.split('.')[0]}: pip install"):
        getattr(grads, call)()


class Writer(dict):
    def add_scalar(self, tag, value, step):
        assert tag not in self and isinstance(value, float) and step == 17
        self[tag] = value


def test_log(grads):
    writer = Writer()
    grads.log(writer, 17)
    frame = grads.frame().query("layer == 1 and direction == 'reverse'")
    assert len(writer) == 4 * (10 + 2 + 4)
    hidden = frame.query("quantity == 'hidden'")["norm"]
    tag = "gradients/LSTM/layer1_reverse"
    assert math.isclose(writer[f"{tag}/norm/hidden"], math.sqrt((hidden**2).sum()))
    assert writer[f"{tag}/nonfinite"] == 0 and 0 <= writer[f"{tag}/reach"] <= 1
    assert math.isclose(writer[f"{tag}/saturated/f"], frame.query("quantity == 'f'")["saturated"].mean())


def test_log_tells_calls_apart(device):
    lstm = triton_lstm.LSTM(4, H).to(device)
    with triton_lstm.record_gradients(lstm) as grads:
        for _ in range(2):
            lstm(torch.randn(T, B, 4, device=device))[0].sum().backward()
    writer = Writer()
    grads.log(writer, 17)
    assert "gradients/LSTM/call1/layer0_forward/reach" in writer


def test_log_into_something_else(grads):
    with pytest.raises(TypeError, match="log wants a SummaryWriter, or what has its add_scalar, got dict"):
        grads.log({}, 17)


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Runs `gradients` in a folder of its own: the status, and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))  # the command sets it
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 200)

    def run(*arguments, command="gradients"):
        status = cli.main([command, "--text", "text.txt", "--seq-len", "12", *arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.mark.parametrize("loss", ["last", "every"])
def test_command_on_a_random_model(loss, command, tmp_path):
    status, out, _ = command("--plot", "out.png", "--loss", loss)
    assert status == 0 and (tmp_path / "out.png").read_bytes().startswith(PNG)
    assert "'lstm', call 0, layer 1, forward, 12 steps:" in out and "picture: out.png" in out
    assert (
        f"a random model, 32 sequences of 12 bytes of text, the loss of {'the last' if loss == 'last' else 'every'}"
        in out
    )


def test_command_on_a_trained_model(command, tmp_path):
    sizes = ["--hidden", "8", "--layers", "3", "--embed", "4", "--batch", "2", "--steps", "2", "--sample", "1"]
    sizes += ["--checkpoint", "run/c.pt"]
    assert command(*sizes, command="train")[0] == 0
    status, out, _ = command("--checkpoint", "run/c.pt", "--plot", "out.svg", "--seed", "1")
    assert status == 0 and "layer 2, forward" in out and "the model of run/c.pt, 2 sequences of 12 bytes" in out
    assert (tmp_path / "out.svg").read_bytes().startswith(SVG)


@pytest.mark.parametrize("arguments, text", [
    (["--plot", "out.jpg"], "cannot save out.jpg: a picture is .png or .svg"),
    (["--plot", "nowhere/out.png"], "its folder is not there"),
    (["--plot", "folder.png"], "it is not a regular file"),
    (["--checkpoint", "none.pt"], "cannot read the checkpoint none.pt"),
    (["--checkpoint", "text.txt"], "is no checkpoint of `train`, or is damaged. Name another --checkpoint"),
    (["--text", "none.txt"], "none.txt"),
    (["--seq-len", "1000000"], "1000000"),
])  # fmt: skip
def test_command_with_what_it_cannot_use(arguments, text, command, tmp_path):
    (tmp_path / "folder.png").mkdir()
    status, out, err = command(*arguments)
    assert status == 2 and text in err and out == "" and len(err.splitlines()) == 1
