"""Checkpoints with arbitrary content: one line and exit status 2, or a run; never a traceback or another file."""

import copy
import json
import shutil
import zlib

import hypothesis.strategies as st
import pytest

pytest.importorskip("pydantic", reason="the schema of checkpoints needs pydantic")
pytest.importorskip("safetensors", reason="checkpoints need safetensors")
import torch
from hypothesis import HealthCheck, given, settings
from training import read, saved, write

from triton_lstm.tuning.progress import Progress

ODD = [
    *(None, True, -1, 0, 5, 10**25, 10**400, 0.5, -0.0, float("nan"), float("inf")),
    *("", "fp32", "x" * 5000, "a\0b\nc", ".", "\x1b[31m"),
    *([], [1], [None], ["nowhere"], {}, {"a": 1}, (1, 2), {1: "a"}),
]
FEW = dict(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def changes(draw, content):
    """The content with one item changed, removed or added."""
    found = copy.deepcopy(content)
    at = found
    while True:
        key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not (isinstance(at[key], dict | list) and at[key] and draw(st.booleans())):
            break
        at = at[key]
    how = draw(st.sampled_from(["change", "change", "change", "leave out", "add"]))
    if how == "leave out":
        del at[key]
    elif how == "add" and isinstance(at, dict):
        at["more"] = draw(st.sampled_from(ODD))
    else:
        at[key] = draw(st.sampled_from(ODD))
    return found


def test_resume_from_any_content(run, tmp_path, quick):
    assert run("--steps", 2, "--dtype", "fp16")[0] == 0
    path = saved(tmp_path)
    content = json.loads((path / "state.json").read_text())

    @settings(**FEW)
    @given(changes(content))
    def check(changed):
        try:
            (path / "state.json").write_text(json.dumps(changed, default=str))
        except (TypeError, ValueError):
            return  # no JSON
        before = (path / "state.json").read_bytes()
        for other in path.parent.glob("step_*"):
            if other != path:
                shutil.rmtree(other)
        status, _, err = run("--steps", 3, "--resume", text=None)
        assert "Traceback" not in err and status in (0, 2)
        if status == 2:
            assert err.startswith("triton-lstm train: ") and err.count("\n") == 1 and err.isascii()
            assert (path / "state.json").read_bytes() == before

    check()


KEPT = {"running": "a", "died": ["b"], "measured": {"c": "in words"}, "failed": {"d": "why"}}


@settings(**FEW)
@given(changes(KEPT))
def test_marker_of_tune_with_any_content(tmp_path_factory, changed):
    """Its content is used or ignored; never an error, and it can be overwritten."""
    path = tmp_path_factory.mktemp("marker") / "gpu.json.running"
    try:
        path.write_text(json.dumps(changed, default=str))
    except (TypeError, ValueError):
        return  # no JSON
    progress = Progress(path, {"c": "in words"})
    assert all(isinstance(item, str) and isinstance(why, str | None) for item, why in progress.results.items())
    progress.begin("c")
    progress.done("c", "in words")
    assert Progress(path, {"c": "in words"}).results["c"] is None


@pytest.mark.parametrize("text", ["", "[" * 100_000, "null", '"x"', "\0", '{"measured": {"c": {}}}'])
def test_marker_of_tune_that_is_not_json(text, tmp_path):
    path = tmp_path / "gpu.json.running"
    path.write_text(text)
    assert Progress(path, {"c": "in words"}).results == {}


SIZES = "the tensors do not match the sizes"
MALFORMED = {
    "no format": (lambda s, t: s.pop("format"), "saved by another version"),
    "the format before": (lambda s, t: s.update(format=2), "saved by another version"),
    "something else": (lambda s, t: s.update(extra=1), "extra"),
    "digest": (lambda s, t: s.update(digest=5), "digest"),
    "another text": (lambda s, t: s.update(digest="f" * 64), "was trained on another text"),
    "a text that is gone": (lambda s, t: s["config"]["data"].update(text=["missing\nhere"]), "missing\\nhere"),
    "a rate": (lambda s, t: s["config"]["optimizer"].update(lr=float("nan")), "optimizer.lr"),
    "a seed": (lambda s, t: s["config"]["execution"].update(seed=10**25), "execution.seed"),
    "an unknown field": (lambda s, t: s["config"]["model"].update(depth=3), "model.depth"),
    "a size": (lambda s, t: s["config"]["model"].update(hidden=9), SIZES),
    "a vocabulary": (lambda s, t: s.update(tokens=10), SIZES),
    "a batch": (lambda s, t: s["config"]["data"].update(batch=3), SIZES),
    "accumulation": (lambda s, t: s["config"]["optimizer"].update(accumulate=2), SIZES),
    "accumulation without end": (lambda s, t: s["config"]["optimizer"].update(accumulate=1 << 31), SIZES),
    "no moments": (lambda s, t: [t.pop(name) for name in list(t) if name.startswith("exp_avg.")], SIZES),
    "a weight is missing": (lambda s, t: t.pop("model.head.bias"), SIZES),
    "a moment is missing": (lambda s, t: t.pop("exp_avg.head.bias"), SIZES),
    "a shape": (lambda s, t: t.update({"exp_avg_sq.head.bias": torch.zeros(3)}), SIZES),
    "a dtype": (lambda s, t: t.update({"model.head.bias": torch.zeros(257, dtype=torch.int32)}), SIZES),
    "a negative square": (lambda s, t: t["exp_avg_sq.head.bias"].sub_(1), "a second moment is negative"),
    "a state": (lambda s, t: t.update({"h.1": t["h.0"].clone()}), SIZES),
    "best": (lambda s, t: s["progress"]["best"].update(loss="low"), "best.loss"),
    "scaler": (lambda s, t: s.update(scaler={"scale": -1.0, "age": 0}), "scaler.scale"),
}


@pytest.mark.parametrize("change, message", MALFORMED.values(), ids=MALFORMED)
def test_resume_from_a_malformed_checkpoint(change, message, run, tmp_path, quick):
    """The error names the problem, and what to do."""
    assert run("--steps", 2)[0] == 0
    path = saved(tmp_path)
    state, tensors = read(path)
    change(state, tensors)
    write(path, state, tensors)
    status, _, err = run("--steps", 3, "--resume", text=None)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert "Start over without --resume" in err or "text" in message or "missing" in message


def shard(checkpoint):
    (path,) = checkpoint.glob("*.safetensors")
    return path


def test_the_checkpoint_before_a_damaged_one_is_of_use(run, tmp_path, quick):
    assert run("--steps", 2, "--save-every", 1, "--folder", "a")[0] == 0
    damaged = tmp_path / "a/checkpoints/step_00000002"
    shard(damaged).write_bytes(shard(damaged).read_bytes()[:-100])
    status, _, err = run("--resume", "--folder", "a", text=None)
    assert status == 2 and "has changed. Move it away to continue from the one before" in err
    damaged.rename(tmp_path / "away")
    assert run("--resume", "--folder", "a", text=None)[0] == 0


@pytest.mark.parametrize("change", ["gone", "one more", "flipped bits", "cut"])
def test_files_that_are_not_those_that_were_written(change, run, tmp_path, recwarn, quick):
    """The format has no checksums of its own."""
    assert run("--steps", 2)[0] == 0
    path = shard(saved(tmp_path))
    content = path.read_bytes()
    if change == "gone":
        path.unlink()
    elif change == "one more":
        path.with_name("another.safetensors").write_bytes(content)
    else:
        path.write_bytes(content[:-1] + (bytes([255 - content[-1]]) if change == "flipped bits" else b""))
    recwarn.clear()
    status, _, err = run("--steps", 3, "--resume")
    assert status == 2 and "is damaged" in err and not recwarn.list


@pytest.mark.parametrize("name", ["tensors", "state.json"])
def test_nothing_in_a_checkpoint_is_executed(name, run, tmp_path, quick):
    """A pickle that would make a file."""
    assert run("--steps", 2)[0] == 0

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    path = saved(tmp_path)
    state = json.loads((path / "state.json").read_text())
    file = shard(path) if name == "tensors" else path / name
    torch.save({"format": 3, "config": Evil()}, file)
    if name == "tensors":
        state["files"] = {file.name: zlib.crc32(file.read_bytes())}
        (path / "state.json").write_text(json.dumps(state))
    status, _, err = run("--steps", 3, "--resume")
    assert status == 2 and "is damaged" in err and not (tmp_path / "made").exists()
