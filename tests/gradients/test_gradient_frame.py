"""Recorded gradients as a frame, as a text summary, as a figure, in TensorBoard and from the command line."""

import math
import os
import sys

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import triton_lstm
from triton_lstm.cli import main as cli

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
        "begun",
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
    """1e-30 squared underflows in float32."""
    for steps in (T, "norm"):
        grads = grads_of(lambda y: (y[-1] * 1e-30).sum(), device, steps)
        norm = grads.frame().query("quantity == 'output'")["norm"].iloc[-1]
        assert math.isclose(norm, 1e-30 * math.sqrt(B * H), rel_tol=1e-6)
        assert grads.frame().query("quantity == 'hidden'")["norm"].gt(0).all()


def of_states(grads):
    """The norm of dL/d(h, c) by step."""
    return torch.cat([grads.hidden, grads.cell], -1).double().flatten(1).norm(dim=1)


def test_summary_says_how_far_back_the_gradient_reaches(device):
    grads = grads_of(lambda y: y[-1].sum(), device, steps=40)
    norms = of_states(grads)
    faded = max(t for t in range(40) if norms[t] < 0.01 * norms.max())
    assert (
        f"largest at step 39 ({norms[39]:.3g}); it drops below 1% of that after {39 - faded} steps, at step {faded}"
        in (grads.summary())
    )
    assert "NaN or infinity: none" in grads.summary() and "saturated gates: hardly any" in grads.summary()


def test_summary_of_the_reverse_direction_runs_the_other_way(device):
    grads = grads_of(lambda y: y[0].sum(), device, steps=40, bidirectional=True).select(direction="reverse")
    norms = of_states(grads)
    faded = min(t for t in range(40) if norms[t] < 0.01 * norms.max())
    assert (
        f"at step 0 ({norms[0]:.3g}); it drops below 1% of that after {faded} steps, at step {faded}" in grads.summary()
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("reduce", [None, "norm"])
def test_summary_follows_what_only_the_cell_carries(reduce, backend, device):
    """An open forget gate and no recurrent weights: dL/dh is zero except at the last step, dL/dc nowhere."""
    lstm = triton_lstm.LSTM(4, H, backend=backend).to(device)
    with torch.no_grad():
        lstm.weight_hh_l0.zero_()
        lstm.bias_ih_l0[H : 2 * H] = 50
    for loss in (lambda y, c: c.sum(), lambda y, c: y[-1].sum()):
        with triton_lstm.record_gradients(lstm, reduce=reduce) as grads:
            y, (_, c) = lstm(torch.randn(40, B, 4, device=device))
            loss(y, c).backward()
        assert "; it reaches step 0 after 39 steps, at " in grads.summary() and "grows" not in grads.summary()


MADE = {  # the loss gradient that enters at each of twelve steps, the step processed last first
    "one step": torch.eye(12)[0],
    "two steps": torch.eye(12)[0] + torch.eye(12)[7] * 1e3,
    "every step": torch.ones(12),
    "less and less": torch.linspace(1, 1e-3, 12),
    "more and more": torch.linspace(1e-3, 1, 12),
    "nothing at the end": torch.linspace(1, 0, 12).sub(0.5).relu(),
}
CELL = {  # scales of the recurrent weights, whether what comes back grows
    "vanishes": (0.1, False),
    "is carried": (2.0, False),  # exactly as large at every step
    "explodes": (10.0, True),
}


def made(asked, scale, reverse, reduce=None, backend="torch", device="cpu", of_state=0.0):
    """A cell at rest, whose gradient is multiplied by the same number in every step.

    of_state: the loss gradient of h_n and c_n, whose steps are the first that backpropagation visits.
    """
    lstm = triton_lstm.LSTM(H, H, bias=False, bidirectional=True, backend=backend).to(device)
    with torch.no_grad():
        for weight in lstm.parameters():
            weight.copy_(torch.eye(H).repeat(4, 1) * scale)
    with triton_lstm.record_gradients(lstm, reduce=reduce) as grads:
        y, states = lstm(torch.zeros(len(asked), B, H, device=device))
        per_step = (asked if reverse else asked.flip(0)).to(device)
        (of_state * sum(state.sum() for state in states) + (y * per_step[:, None, None]).sum()).backward()
    return grads.select(direction="reverse" if reverse else "forward")


def carried(grads):
    """Of a recording with every element: the norm of what flows back to each step, in the order of backpropagation."""
    back = (grads.hidden - grads.output).double().flatten(1).norm(dim=1)
    return back if grads[0].direction == "reverse" else back.flip(0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELL)
@pytest.mark.parametrize("asked", MADE)
def test_summary_says_that_it_grows_only_where_it_does(asked, cell, reverse):
    scale, grows = CELL[cell]
    summaries = [made(MADE[asked], scale, reverse, reduce).summary() for reduce in (None, "norm")]
    assert summaries[0] == summaries[1]
    assert ("it grows going back" in summaries[0]) == grows


def test_the_made_cells_do_what_they_are_called():
    back = {cell: carried(made(MADE["one step"], scale, False))[1:] for cell, (scale, _) in CELL.items()}
    own = math.sqrt(B * H)
    assert back["vanishes"][-1] < 1e-3 * own
    torch.testing.assert_close(back["is carried"], torch.full((11,), 0.5 * own, dtype=torch.float64))
    assert back["explodes"][-1] > 1e4 * own and (back["explodes"].diff() > 0).all()


def test_summary_of_a_gradient_that_grows(device):
    """The ratio to the total that entered at the steps before."""
    for reduce in (None, "norm"):
        grads = made(MADE["one step"], 10.0, False, reduce, "triton", device)
        norms = grads.frame().query("quantity == 'hidden'")["norm"].to_numpy()
        start = f"; the gradient flowing back to step 0 is {norms[0] / norms[-1]:.3g} times the total that entered at "
        assert f"{start}the steps it came from: it grows going back; backpropagation ends there" in grads.summary()


def test_summary_of_growth_elsewhere_than_at_the_largest():
    """A loss gradient of the opposite sign, and larger, at the step visited last."""
    asked = MADE["one step"].clone()
    asked[-1] = -1e9
    grads = made(asked, 10.0, False)
    assert "largest at step 0" in grads.summary()
    assert "; the gradient flowing back to step 1 is " in grads.summary() and "it grows" in grads.summary()


@pytest.mark.parametrize("reverse", [False, True])
def test_summary_of_a_ramp(reverse, device):
    """The loss gradient is 1000 times larger at the step visited last; little flows back through time."""
    ramp = torch.linspace(1e-3, 1, 40)
    for reduce in (None, "norm"):
        text = made(ramp, 1.0, reverse, reduce, "triton", device).summary()
        assert f"largest at step {39 if reverse else 0} " in text and "grows" not in text
        assert "; not all of it flowed through time: at 40 of 40 steps a gradient enters directly, from the" in text


def test_summary_compares_with_what_enters_at_each_step():
    grads = made(MADE["less and less"], 1.0, False)
    norms = [getattr(grads, name).double().flatten(1).norm(dim=1) for name in ("hidden", "output")]
    times = norms[0] / norms[1]
    assert f"and |dL/dh| is {times.min():.3g} to {times.max():.3g} times that" in grads.summary()
    assert "through time" not in made(MADE["one step"], 1.0, False).summary()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("reverse", [False, True])
def test_summary_counts_what_enters_through_the_last_states(reverse, backend, device):
    """A thousand times the output's gradient: dL/dh is large for many steps but does not grow; and where it does."""
    asked = torch.full((12,), 1e-3)
    for reduce in (None, "norm"):
        for scale, grows in CELL.values():
            text = made(asked, scale, reverse, reduce, backend, device, of_state=1.0).summary()
            assert ("grows" in text) == grows


def test_summary_of_a_lower_layer_knows_what_enters_from_above(device):
    """Nothing flows back through time in it: all of its gradient is the upper layer's, which grows."""
    lstm = triton_lstm.LSTM(H, H, 2, bias=False).to(device)
    with torch.no_grad():
        for name, weight in lstm.named_parameters():
            scale = 10.0 if name.endswith("l1") else 1.0 if name == "weight_ih_l0" else 0.0
            weight.copy_(torch.eye(H).repeat(4, 1) * scale)
    with triton_lstm.record_gradients(lstm) as grads:
        lstm(torch.zeros(12, B, H, device=device))[0][-1].sum().backward()
    above, below = (grads.select(layer=layer).summary() for layer in (1, 0))
    assert "grows" in above and "grows" not in below
    hidden = grads.select(layer=0).hidden.double().flatten(1).norm(dim=1)
    assert hidden[0] > 1e3 * hidden[-1] and "at 12 of 12 steps a gradient enters directly" in below


def test_summary_of_packed_rows_knows_where_each_sequence_ends(device):
    """The gradient of h_n enters at three steps."""
    lstm = triton_lstm.LSTM(4, H).to(device)
    x = pack_padded_sequence(torch.randn(T, B, 4, device=device), [T, 3, 1])
    for reduce in (None, "norm"):
        with triton_lstm.record_gradients(lstm, reduce=reduce) as grads:
            (lstm(x)[1][0] * torch.tensor([1e-3, 1.0, 1e3], device=device)[:, None]).sum().backward()
        assert "grows" not in grads.summary() and "at 3 of 6 steps a gradient enters directly" in grads.summary()


def test_summary_of_a_gradient_that_reaches_the_end(device):
    assert "; it reaches step 0 after 2 steps, at " in grads_of(lambda y: y[-1].sum(), device, steps=3).summary()


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
        f"first at step {T - 1} in hidden (1 of its values); "
        "it came from the gradient of h_n or c_n, or originated here" in forward
    )
    assert "in input (1 of its values); both directions share the input" in reverse


def test_summary_of_an_overflow_inside_the_layer(device):
    """Finite from above; too large for the numbers on its way back."""
    grads = grads_of(lambda y: (y[-1] * 1e38).sum(), device, scale=30)
    assert "it originated here" in grads.summary()


def test_summary_of_saturated_gates(device):
    grads = grads_of(lambda y: y.sum(), device, scale=100)
    line = next(line for line in grads.summary().splitlines() if "saturated" in line)
    shares = [int(part.split()[-1].rstrip("%")) for part in line.split(": ")[1].split(", ")]
    assert len(shares) == 4 and all(80 < share <= 100 for share in shares)


def test_summary_without_any_gradient(device):
    assert "gradient: zero everywhere" in grads_of(lambda y: (y * 0).sum(), device).summary()
    assert "gradient: not finite at any step" in grads_of(lambda y: (y * float("nan")).sum(), device).summary()
    assert "gradient: not finite at any step" in grads_of(lambda y: (y * float("inf")).sum(), device).summary()


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


def test_plot_distinguishes_series_from_each_other_and_from_nan(device):
    """No colour near the red of NaN, no two series that look the same; colour bars say what they show."""
    lstm = triton_lstm.LSTM(4, H, 4, bidirectional=True, backend="torch").to(device)
    with triton_lstm.record_gradients(lstm) as grads:
        for steps in (3, 3, 1):
            y = lstm(torch.randn(steps, B, 4, device=device))[0]
            (y[-1].sum() + y[0, 0, 0] * float("nan")).backward()
    from matplotlib.colors import to_rgb

    lines, *maps = grads.plot().axes
    series, odd = ([line for line in lines.lines if line.get_label().startswith("call") == named] for named in (1, 0))
    assert len(series) == 24 and len({(line.get_color(), line.get_linestyle()) for line in series}) == 24
    assert {line.get_color() for line in odd} == {"red"}
    for line in series:
        red, green, blue = to_rgb(line.get_color())
        assert not red > 0.5 or max(green, blue) > 0.6 * red
    assert [axes.get_ylabel() for axes in maps] == ["", "", "log10(norm)", "log10(norm)"]
    assert all(axes.get_title().endswith("grey: zero, or no such step") for axes in maps[:2])


def test_plot_of_one_step_has_one_tick():
    figure = grads_of(lambda y: y.sum(), steps=1, backend="torch").plot()
    figure.canvas.draw()
    assert all([t for t in axes.get_xticks() if -0.5 <= t <= 0.5] == [0] for axes in figure.axes[:3])


def test_plot_says_how_many_of_many(device):
    lstm = triton_lstm.LSTM(4, H, backend="torch").to(device)
    with triton_lstm.record_gradients(lstm) as grads:
        for steps in range(1, 31):
            lstm(torch.randn(steps, B, 4, device=device))[0].sum().backward()
    figure = grads.plot()
    assert "24 of 30" in figure.get_suptitle() and figure.axes[1].get_yticklabels()[3].get_text() == "call 3 layer 0"


def test_plot_to_another_suffix(grads, tmp_path):
    with pytest.raises(ValueError, match=r"the figure can be saved as .png or .svg, got '.*out.bmp'"):
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


def test_log_distinguishes_calls(device):
    lstm = triton_lstm.LSTM(4, H).to(device)
    with triton_lstm.record_gradients(lstm) as grads:
        for _ in range(2):
            lstm(torch.randn(T, B, 4, device=device))[0].sum().backward()
    writer = Writer()
    grads.log(writer, 17)
    assert "gradients/LSTM/call1/layer0_forward/reach" in writer


def test_log_into_something_else(grads):
    with pytest.raises(TypeError, match="log expects a SummaryWriter or an object with add_scalar, got dict"):
        grads.log({}, 17)


@pytest.fixture
def command(capsys, monkeypatch, tmp_path, own_text_cache):
    """Runs `gradients` in a folder of its own: the status and the output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))  # the command sets it
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 200)

    def run(*arguments, command="gradients", text="text.txt"):
        status = cli.main([command, *(["--text", text] if text else []), "--seq-len", "12", *arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.mark.parametrize("loss", ["last", "every"])
def test_command_on_a_random_model(loss, command, tmp_path):
    status, out, _ = command("--plot", "out.png", "--loss", loss)
    assert status == 0 and (tmp_path / "out.png").read_bytes().startswith(PNG)
    assert "'lstm', call 0, layer 0, forward, 12 steps:" in out and "figure: out.png" in out
    which = "the last" if loss == "last" else "every"
    assert f"a random model, 64 sequences of 12 tokens of text, loss of {which}" in out


SMALL = ["--hidden", "8", "--embed", "4", "--batch", "2", "--sample", "1", "--folder", "run"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_command_on_a_trained_model(dtype, command, tmp_path):
    assert command(*SMALL, "--layers", "3", "--steps", "2", "--dtype", dtype, command="train")[0] == 0
    status, out, _ = command("--checkpoint", "run", "--plot", "out.svg", "--seed", "1")
    path = "run/checkpoints/step_00000002"
    assert status == 0 and "layer 2, forward" in out and f"the model of {path}, 2 sequences of 12 tokens" in out
    assert (tmp_path / "out.svg").read_bytes().startswith(SVG)
    assert command("--checkpoint", path)[0] == command("--checkpoint", "run/checkpoints/best")[0] == 0


def test_command_reads_the_text_of_the_checkpoint(command, monkeypatch, tmp_path):
    """Not Python's sources, as a model of one letter shows; a text that has changed is an error."""
    (tmp_path / "text.txt").write_bytes(b"z" * 3000)
    assert command(*SMALL, "--steps", "1", command="train")[0] == 0
    from triton_lstm.training.batches import Windows

    seen = []
    at = Windows.__getitem__
    monkeypatch.setattr(Windows, "__getitem__", lambda self, index: seen.append(at(self, index)) or seen[-1])
    monkeypatch.chdir(tmp_path / "run")
    status, out, _ = command("--checkpoint", ".", text=None)
    assert status == 0 and "2 sequences of 12 tokens of held-out text" in out
    assert len(seen) == 1 and (seen[0].inputs == ord("z")).sum() > 20

    (tmp_path / "text.txt").write_bytes(b"y" * 3000)
    status, out, err = command("--checkpoint", ".", text=None)
    path = "checkpoints/step_00000001"
    assert status == 2 and out == "" and len(err.splitlines()) == 1
    assert f"text.txt: no longer the text that {path} was trained on. Give one with --text." in err
    assert command("--checkpoint", ".", text="../text.txt")[0] == 0

    (tmp_path / "text.txt").unlink()
    status, out, err = command("--checkpoint", ".", text=None)
    assert status == 2 and out == "" and len(err.splitlines()) == 1
    assert f"the text that {path} was trained on is not available: cannot read the text" in err
    assert err.endswith("by --text.\n")


@pytest.mark.parametrize("arguments, text", [
    (["--plot", "out.jpg"], "cannot save out.jpg: the suffix must be .png or .svg"),
    (["--plot", "nowhere/out.png"], "its folder does not exist"),
    (["--plot", "folder.png"], "it is not a regular file"),
    (["--checkpoint", "none.pt"], "none.pt does not exist. Train first"),
    (["--checkpoint", "text.txt"], "text.txt contains no checkpoint of `train`. Train first, or name another run"),
    (["--text", "none.txt"], "none.txt"),
    (["--seq-len", "1000000"], "1000000"),
])  # fmt: skip
def test_command_with_what_it_cannot_use(arguments, text, command, tmp_path):
    (tmp_path / "folder.png").mkdir()
    status, out, err = command(*arguments)
    assert status == 2 and text in err and out == "" and len(err.splitlines()) == 1
