"""Checkpoints with arbitrary content: one line and exit status 2, or a run; never a traceback or another file."""

import copy
import json

import hypothesis.strategies as st
import pytest

pytest.importorskip("pydantic", reason="the schema of checkpoints needs pydantic")
import torch
from hypothesis import HealthCheck, given, settings
from training import saved

from triton_lstm.tuning.progress import Progress

ODD = [
    *(None, True, -1, 0, 5, 10**25, 10**400, 0.5, -0.0, float("nan"), float("inf")),
    *("", "fp32", "x" * 5000, "a\0b\nc", ".", "\x1b[31m"),
    *([], [1], [None], ["nowhere"], {}, {"a": 1}, (1, 2), {1: "a"}),
    *(torch.zeros(3), torch.zeros(256, dtype=torch.cfloat), torch.zeros(2, 2).to_sparse(), torch.zeros(0)),
    torch.zeros(256, device="meta"),
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
    content = torch.load(path, weights_only=True)

    @settings(**FEW)
    @given(changes(content))
    def check(changed):
        torch.save(changed, path)
        before = path.read_bytes()
        for other in path.parent.glob("step_*.pt"):
            if other != path:
                other.unlink()
        status, _, err = run("--steps", 3, "--resume", text=None)
        assert "Traceback" not in err and status in (0, 2)
        if status == 2:
            assert err.startswith("triton-lstm train: ") and err.count("\n") == 1 and err.isascii()
            assert path.read_bytes() == before

    check()


KEPT = {"running": "a", "died": ["b"], "measured": {"c": "in words"}, "failed": {"d": "why"}}


@settings(**FEW)
@given(changes(KEPT).filter(lambda changed: "tensor" not in repr(changed)))
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


MALFORMED = {
    "no format": (lambda c: c.pop("format"), "saved by another version"),
    "the format before": (lambda c: c.update(format=1), "saved by another version"),
    "something else": (lambda c: c.update(extra=1), "extra"),
    "digest": (lambda c: c.update(digest=5), "digest"),
    "another text": (lambda c: c.update(digest="f" * 64), "was trained on another text"),
    "a text that is gone": (lambda c: c["config"]["data"].update(text=["missing\nhere"]), "missing\\nhere"),
    "a rate": (lambda c: c["config"]["optimizer"].update(lr=float("nan")), "optimizer.lr"),
    "a seed": (lambda c: c["config"]["execution"].update(seed=10**25), "execution.seed"),
    "an unknown field": (lambda c: c["config"]["model"].update(depth=3), "model.depth"),
    "a size": (lambda c: c["config"]["model"].update(hidden=9), "the tensors do not match the sizes"),
    "a vocabulary": (lambda c: c.update(tokens=10), "the tensors do not match the sizes"),
    "a batch": (lambda c: c["config"]["data"].update(batch=3), "the states do not match the sizes"),
    "accumulation": (lambda c: c["config"]["optimizer"].update(accumulate=2), "the states do not match the sizes"),
    "no model": (lambda c: c.pop("model"), "model"),
    "no moments": (lambda c: c.pop("exp_avg"), "exp_avg"),
    "a weight is missing": (lambda c: c["model"].pop("head.bias"), "the tensors do not match the sizes"),
    "a moment is missing": (lambda c: c["exp_avg"].pop("head.bias"), "the tensors do not match the sizes"),
    "a shape": (lambda c: c["exp_avg_sq"].update({"head.bias": torch.zeros(3)}), "the tensors do not match"),
    "a dtype": (lambda c: c["model"].update({"head.bias": torch.zeros(257, dtype=torch.int32)}), "the tensors do not"),
    "no data": (lambda c: c["model"].update({"head.bias": torch.zeros(257, device="meta")}), "the tensors do not"),
    "a negative square": (lambda c: c["exp_avg_sq"]["head.bias"].sub_(1), "a second moment is negative"),
    "a state": (lambda c: c["states"].append(c["states"][0]), "the states do not match the sizes"),
    "best": (lambda c: c["progress"]["best"].update(loss="low"), "best.loss"),
    "scaler": (lambda c: c.update(scaler={"scale": -1.0, "age": 0}), "scaler.scale"),
}


@pytest.mark.parametrize("change, message", MALFORMED.values(), ids=MALFORMED)
def test_resume_from_a_malformed_checkpoint(change, message, run, tmp_path, quick):
    """The error names the problem, and what to do."""
    assert run("--steps", 2)[0] == 0
    path = saved(tmp_path)
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    status, _, err = run("--steps", 3, "--resume", text=None)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert "Start over without --resume" in err or "text" in message or "missing" in message


def test_the_checkpoint_before_a_damaged_one_is_of_use(run, tmp_path, quick):
    assert run("--steps", 2, "--save-every", 1, "--folder", "a")[0] == 0
    damaged = tmp_path / "a/checkpoints/step_00000002.pt"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    status, _, err = run("--resume", "--folder", "a", text=None)
    assert status == 2 and "is damaged. Move it away to continue from the one before" in err
    damaged.rename(tmp_path / "away.pt")
    assert run("--resume", "--folder", "a", text=None)[0] == 0


def test_pytorchs_warnings_about_an_invalid_file_are_hidden(run, tmp_path, recwarn, quick):
    assert run("--steps", 2)[0] == 0
    torch.save({"a": torch.zeros(2)}, saved(tmp_path), pickle_protocol=4)
    recwarn.clear()
    status, _, err = run("--steps", 3, "--resume")
    assert status == 2 and "is damaged" in err and not recwarn.list


def test_resume_from_a_file_with_flipped_bits(run, tmp_path, quick):
    """torch.load would take them: it does not verify the checksums of the archive."""
    assert run("--steps", 2)[0] == 0
    path = saved(tmp_path)
    weights = torch.load(path, weights_only=True)["model"]["lstm.weight_hh_l0"].cpu().numpy().tobytes()
    content = path.read_bytes()
    assert weights in content
    path.write_bytes(content.replace(weights, bytes(255 - b for b in weights)))
    status, _, err = run("--steps", 3, "--resume")
    assert status == 2 and "is damaged" in err


def test_nothing_in_a_checkpoint_is_executed(run, tmp_path, quick):
    """A pickle that would make a file."""
    assert run("--steps", 2)[0] == 0

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    torch.save({"format": 2, "config": Evil()}, saved(tmp_path))
    status, _, err = run("--steps", 3, "--resume")
    assert status == 2 and "is damaged" in err and not (tmp_path / "made").exists()
