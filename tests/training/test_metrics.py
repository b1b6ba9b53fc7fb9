"""What a run logs: metrics.csv after any interruption, TensorBoard, Weights & Biases."""

import contextlib
import json
import math
import os
import signal
import struct
import subprocess
import sys

import hypothesis.strategies as st
import pytest

pytest.importorskip("pydantic", reason="the configuration needs pydantic")
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings

from triton_lstm.gradients.record import record_gradients
from triton_lstm.module import LSTM
from triton_lstm.settings import UsageError
from triton_lstm.training.config import Config, Output
from triton_lstm.training.logs import metrics as module
from triton_lstm.training.logs.metrics import COLUMNS, HEADER, Metrics, repair

CONFIG = Config()
BOARD = Config(output=Output(tensorboard=True))
PREAMBLE = """
import sys
from pathlib import Path
from triton_lstm.settings import UsageError
from triton_lstm.training.config import Config, Output
from triton_lstm.training.logs.metrics import Metrics
folder = Path(sys.argv[1])
"""


def script(code, folder, **options):
    return subprocess.Popen([sys.executable, "-c", PREAMBLE + code, str(folder)], stdout=subprocess.PIPE, **options)


def rows(path):
    header, *lines = path.read_text().split("\n")
    assert header.split(",") == list(COLUMNS) and lines.pop() == ""
    return [dict(zip(COLUMNS, line.split(","), strict=True)) for line in lines]


def test_a_row_has_full_precision_and_empty_cells(tmp_path):
    with Metrics(tmp_path, CONFIG) as metrics:
        metrics.log(10, tokens=2**40, loss=0.1 + 0.2, lr=None, grad_norm=torch.tensor(2.5), loss_scale=math.inf)
        assert (
            (tmp_path / "metrics.csv").read_bytes().endswith(b"\n10,1099511627776,,0.30000000000000004,,2.5,,inf,,\n")
        )
        metrics.log(10, validation_loss=math.nan)
    assert [row["validation_loss"] for row in rows(tmp_path / "metrics.csv")] == ["", "nan"]


def test_an_unknown_column_is_an_error(tmp_path):
    with Metrics(tmp_path, CONFIG) as metrics, pytest.raises(ValueError, match="no columns accuracy"):
        metrics.log(1, accuracy=1.0)
    assert rows(tmp_path / "metrics.csv") == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cut")


@hypothesis_settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_a_file_cut_anywhere_keeps_its_whole_rows(folder, data):
    steps = data.draw(st.lists(st.integers(0, 30), max_size=8).map(sorted))
    lines = [f"{step},{step * 7},,{step / 3!r},,,,,,\n".encode() for step in steps]
    content = HEADER + b"".join(lines)
    cut, last_step = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 30))
    path = folder / "metrics.csv"
    path.write_bytes(content[:cut])
    expected, end = HEADER, len(HEADER)
    for step, line in zip(steps, lines, strict=True):
        end += len(line)
        expected += line if end <= cut and step <= last_step else b""
    repair(path, last_step)
    assert path.read_bytes() == expected
    repair(path, last_step)
    assert path.read_bytes() == expected


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a,b\n1,2\n", "other columns"),
        (b"step", None),
        (HEADER.replace(b",lr", b""), "other columns"),
        (b"\x80\x04binary", "other columns"),
        (HEADER + b"1,,,,,,,,,\nx,,,,,,,,,\n2,,,,,,,,,\n", "damaged in line 3"),
        (HEADER + b"1,2\n", "damaged in line 2"),
        (HEADER + b"1" * 5000 + b",,,,,,,,,\n", "damaged in line 2"),
        (HEADER + b"1,,,,,,,,,\n\0\0\0\0", None),
    ],
)
def test_what_is_not_a_run_s_is_left_as_it_is(tmp_path, content, message):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    if message:
        with pytest.raises(UsageError, match=message), Metrics(tmp_path, CONFIG, 5):
            pytest.fail("it was opened")
        assert path.read_bytes() == content and os.listdir(tmp_path) == ["metrics.csv"]
    else:
        with Metrics(tmp_path, CONFIG, 5):
            assert path.read_bytes().startswith(HEADER)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_no_regular_file(tmp_path, make):
    make(tmp_path / "metrics.csv")
    with pytest.raises(UsageError, match="not a regular file"), Metrics(tmp_path, CONFIG):
        pytest.fail("it was opened")


def test_killed_while_it_logs(tmp_path):
    """Everything whose log() returned is there, and the run goes on after its last checkpoint."""
    child = script(
        "import itertools, os\n"
        "with Metrics(folder, Config()) as metrics:\n"
        "    for step in itertools.count(1):\n"
        "        metrics.log(step, tokens=step, loss=1 / step, lr=1e-3, tokens_per_s=1e5 / 3)\n"
        "        os.write(1, b'%d\\n' % step)\n",
        tmp_path,
    )
    for line in child.stdout:
        if int(line) == 200:
            break
    child.send_signal(signal.SIGKILL)
    told = 200 + len([line for line in child.stdout if line.endswith(b"\n")])
    child.wait(timeout=100)
    assert child.returncode == -signal.SIGKILL
    repair(tmp_path / "metrics.csv", 10**9)
    steps = [int(row["step"]) for row in rows(tmp_path / "metrics.csv")]
    assert steps == list(range(1, len(steps) + 1)) and told <= len(steps) <= told + 1
    with Metrics(tmp_path, CONFIG, resumed_from=150) as metrics:
        metrics.log(151, loss=0.5)
    found = rows(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in found] == list(range(1, 152))
    assert float(found[149]["loss"]) == 1 / 150 and found[150]["loss"] == "0.5"


def test_a_full_disk(tmp_path):
    """TensorBoard, whose files are larger, is given up with one line; metrics.csv ends with an error and whole rows."""
    child = script(
        "import resource\n"
        "before = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "with Metrics(folder, Config(output=Output(tensorboard=True))) as metrics:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))\n"
        "    for step in range(1, 1000):\n"
        "        try:\n"
        "            metrics.log(step, tokens=step, loss=1 / step, lr=1e-3, tokens_per_s=1e5 / 3)\n"
        "        except OSError as error:\n"
        "            print(step, error.filename, error.strerror)\n"
        "            break\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, before)\n",  # coverage writes, too
        tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = child.communicate(timeout=100)
    step, filename, reason = out.split(maxsplit=2)
    assert filename == str(tmp_path / "metrics.csv") and reason == "File too large\n"
    assert err == "TensorBoard failed: [Errno 27] File too large. This run no longer logs to it\n"
    assert child.returncode == 0
    content = (tmp_path / "metrics.csv").read_bytes()
    assert len(content) == 10_000 and not content.endswith(b"\n")
    repair(tmp_path / "metrics.csv", 1000)
    assert [int(row["step"]) for row in rows(tmp_path / "metrics.csv")] == list(range(1, int(step)))


class Spy:
    """A tracker that fails at a step."""

    def __init__(self, name, fails_at=-1):
        self.name, self.fails_at, self.calls = name, fails_at, []

    def log(self, step, values):
        self.calls.append(("log", step, values))
        if step == self.fails_at:
            raise ConnectionError("lost\nfor good")

    def close(self, exit_code):
        self.calls.append(("close", exit_code))
        if self.fails_at >= 0:
            raise ConnectionError("still lost")


def test_a_tracker_that_fails_is_given_up(tmp_path, monkeypatch, capsys):
    bad, good = Spy("W&B", fails_at=2), Spy("TensorBoard")
    monkeypatch.setattr(module, "open_trackers", lambda *args: [bad, good])
    with contextlib.suppress(KeyboardInterrupt), Metrics(tmp_path, CONFIG) as metrics:
        for step in (1, 2, 3):
            metrics.log(step, loss=0.5, lr=None)
        raise KeyboardInterrupt
    assert bad.calls == [("log", 1, {"loss": 0.5}), ("log", 2, {"loss": 0.5}), ("close", 1)]
    assert good.calls == [("log", step, {"loss": 0.5}) for step in (1, 2, 3)] + [("close", 1)]
    assert len(rows(tmp_path / "metrics.csv")) == 3
    assert capsys.readouterr().err == "W&B failed: lost. This run no longer logs to it\n"


@pytest.mark.parametrize(
    "missing, output, message",
    [
        ("tensorboard", Output(tensorboard=True), r'requires tensorboard: pip install "\.\[train\]"'),
        ("wandb", Output(wandb="x"), r'requires wandb: pip install "\.\[wandb\]"'),
        ("matplotlib", Output(tensorboard=True, gradients_every=5), "requires matplotlib"),
        ("nothing", Output(gradients_every=5), "--gradients-every has nowhere to go"),
    ],
)
def test_missing_packages(tmp_path, monkeypatch, missing, output, message):
    if missing != "tensorboard" and output.tensorboard:
        pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError, match=message), Metrics(tmp_path, Config(output=output)):
        pytest.fail("training would start")
    assert not list(tmp_path.iterdir())


def gradients():
    """Of an LSTM with two layers."""
    lstm = LSTM(3, 4, num_layers=2)
    with record_gradients(lstm) as grads:
        lstm(torch.randn(5, 2, 3))[0].sum().backward()
    return grads


def test_tensorboard(tmp_path):
    """The events of a resumed run are as if it had never been interrupted."""
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(tmp_path, BOARD) as metrics:
        for step in range(1, 6):
            metrics.log(step, loss=10.0 + step, validation_loss=math.inf if step == 2 else None)
    with Metrics(tmp_path, BOARD, resumed_from=3) as metrics:
        for step in (4, 5):
            metrics.log(step, loss=20.0 + step)
        metrics.log_text(5, "<b>\n# no heading")
        metrics.log_gradients(5, gradients())
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 11), (2, 12), (3, 13), (4, 24), (5, 25)]
    assert [(e.step, e.value) for e in events.Scalars("validation_loss")] == [(2, math.inf)]
    text = events.Tensors("sample/text_summary")[0].tensor_proto.string_val[0]
    assert text == b"    <b>\n    # no heading"
    norms = [tag for tag in events.Tags()["scalars"] if tag.endswith("norm/hidden")]
    assert len(norms) == 2 and all(events.Scalars(tag)[0].value > 0 for tag in norms)
    assert events.Images("gradients")[0].encoded_image_string.startswith(b"\x89PNG")


OFFLINE = """
config = Config(output=Output(wandb="project"))
with Metrics(folder, config) as metrics:
    for step in (1, 2, 3):
        metrics.log(step, loss=step / 4)
try:
    with Metrics(folder, config, resumed_from=2) as metrics:
        metrics.log(3, loss=float("nan"), lr=0.5)
        metrics.log_text(3, "<script>")
        sys.path.insert(0, "tests/training")
        from test_metrics import gradients
        metrics.log_gradients(3, gradients())
        1 / 0
except ZeroDivisionError:
    pass
"""


def offline_runs(folder):
    """What `wandb sync` would upload: id, name, project, configuration, history and exit code of each process."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        run = {"config": {}, "history": []}
        for content in leveldb_log(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(content)
            if record.HasField("run"):
                run |= {"id": record.run.run_id, "name": record.run.display_name, "project": record.run.project}
                run["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                run["history"].append({key: json.loads(value) for key, value in items.items()})
            if record.HasField("exit"):
                run["exit"] = record.exit.exit_code
        yield run


def leveldb_log(content):
    """The records of a file: a header of 7 bytes, then blocks of chunks: checksum, length, kind."""
    at, record = 7, b""
    while at < len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last chunk of one
            yield record
            record = b""


def without_account(folder, **variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return kept | {"HOME": str(folder), "NETRC": str(folder / "none")} | variables


def test_wandb_offline(tmp_path):
    """Both processes log to one run."""
    pytest.importorskip("wandb")
    run = tmp_path / "2026-11-27_10-00-00"
    run.mkdir()
    child = script(OFFLINE, run, env=without_account(tmp_path, WANDB_MODE="offline"), stderr=subprocess.PIPE)
    _, err = child.communicate(timeout=100)
    assert child.returncode == 0, err.decode()
    first, second = offline_runs(run)
    assert first["id"] == second["id"] and first["name"] == run.name and first["project"] == "project"
    assert first["config"]["model"]["hidden"] == CONFIG.model.hidden
    assert [(row["step"], row["loss"]) for row in first["history"]] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    loss, sample, grads = second["history"]
    assert math.isnan(loss["loss"]) and (loss["step"], loss["lr"]) == (3, 0.5)
    assert sample["sample/_type"] == "html-file" and grads["gradients/_type"] == "image-file"
    assert sum(name.endswith("norm/hidden") for name in grads) == 2
    (page,) = run.glob("wandb/offline-run-*/files/media/html/*.html")
    assert "<pre>&lt;script&gt;</pre>" in page.read_text()
    assert (first["exit"], second["exit"]) == (0, 1)


@pytest.mark.parametrize("variables", [{}, {"WANDB_MODE": "nonsense"}], ids=["no login", "bad setting"])
def test_wandb_that_cannot_begin(tmp_path, variables):
    """In a terminal, where it would ask for a key and wait."""
    pytest.importorskip("wandb")
    import pty

    ours, theirs = pty.openpty()
    code = (
        "try:\n"
        "    with Metrics(folder, Config(output=Output(wandb='project'))):\n"
        "        pass\n"
        "except UsageError as error:\n"
        "    (folder / 'said').write_text(str(error))\n"
    )
    child = script(code, tmp_path, env=without_account(tmp_path, **variables), stdin=theirs, stderr=theirs)
    try:
        assert child.wait(timeout=100) == 0
    finally:
        child.kill()
        os.close(ours)
        os.close(theirs)
    said = (tmp_path / "said").read_text()
    assert said.startswith("cannot log to Weights & Biases: ") and "\n" not in said
    assert "wandb login" in said and "WANDB_MODE=offline" in said
