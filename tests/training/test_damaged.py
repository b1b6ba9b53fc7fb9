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
    *([], [1], [None], ["/"], {}, {"a": 1}, (1, 2), {1: "a"}),
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


def test_resume_from_any_content(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_LSTM_BACKEND", "torch")
    assert run("--steps", 2)[0] == 0
    path = saved(tmp_path)
    content = torch.load(path, weights_only=True)

    @settings(**FEW)
    @given(changes(content))
    def check(changed):
        torch.save(changed, path)
        before = path.read_bytes()
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
