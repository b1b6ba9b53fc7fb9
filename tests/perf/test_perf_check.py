"""The check before timing: correct results pass, wrong ones are named."""

import contextlib

import pytest
import torch
from torch import nn

import triton_lstm
from triton_lstm.core.tolerance import worst_share
from triton_lstm.perf.cases import Case
from triton_lstm.perf.check import Check, answer, make_problem
from triton_lstm.perf.providers import OURS, PROVIDERS, make
from triton_lstm.perf.results import BASELINE
from triton_lstm.settings import switches

CASES = [
    Case("fp32", T=3, B=2, H=4, I=5),
    Case("bf16", T=3, B=2, H=8, layers=2, bidirectional=True, batch_first=True),
    Case("fp32", T=4, B=3, H=6, proj_size=2),
    Case("fp32", T=5, B=4, H=6, packed=True),
    Case("fp32", T=6, B=3, H=4, resets=0.2),
    Case("bf16", T=5, B=3, H=8, layers=2, bidirectional=True, batch_first=True, resets=0.2),
    Case("fp32", T=4, B=3, H=6, proj_size=2, resets=0.0),
]
ABLE = [OURS, BASELINE, "step by step", "torch.compile"]


@pytest.mark.sensitive
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_correct_providers_pass(case, device):
    problem = make_problem(case, device)
    check = Check(problem)
    passed = []
    for name in ABLE:
        if PROVIDERS[name].why_not(case, device) is None:
            row = check(make(PROVIDERS[name], case, problem.twin))
            assert "status" not in row and 0 <= row["error_share"] <= 1 and 0 <= row["error"] < 0.02, name
            passed.append(name)
    assert BASELINE in passed and len(passed) >= 2


def test_the_data_is_the_same_every_time_and_random(device):
    first, again, other = make_problem(CASES[0], device), make_problem(CASES[0], device), make_problem(CASES[2], device)
    assert torch.equal(first.inputs[0], again.inputs[0])
    assert torch.equal(first.twin.weight_hh_l0, again.twin.weight_hh_l0)
    assert not torch.equal(first.inputs[0], first.inputs[1])
    assert not torch.equal(first.inputs[0].flatten()[:5], other.inputs[0].flatten()[:5])


class Off(nn.Module):
    """nn.LSTM with a defect."""

    def __init__(self, twin, fault):
        super().__init__()
        self.inner, self.fault = twin, fault

    def forward(self, x):
        y, (h_n, c_n) = self.inner(x)
        if self.fault == "output":
            y = y + 0.01
        elif self.fault == "nan":
            y = y.where(y < y.max(), torch.nan)
        elif self.fault == "zeros":
            y = y * 0
        elif self.fault == "last state":
            c_n = h_n
        elif self.fault == "shape":
            y = y[:-1]
        elif self.fault == "gradient":
            y = y.detach() + 1.1 * (y - y.detach())
        elif self.fault == "one weight's gradient" and self.inner.weight_hh_l0.requires_grad:
            self.inner.weight_hh_l0.register_hook(lambda grad: grad * 1.1)
        return y, (h_n, c_n)


@pytest.mark.parametrize(
    "fault, named",
    [
        ("output", "y"),
        ("nan", "y"),
        ("zeros", ""),
        ("last state", "c_n"),
        ("gradient", "d"),
        ("one weight's gradient", "dweight_hh_l0"),
    ],
)
@pytest.mark.parametrize("case", [CASES[0], Case("bf16", T=4, B=8, H=32)], ids=lambda case: case.name)
def test_wrong_providers_are_named(case, fault, named, device):
    problem = make_problem(case, device)
    row = Check(problem)(Off(problem.twin, fault))
    assert row["status"] == "wrong" and row["reason"].startswith(named) and "times the allowed error" in row["reason"]


@pytest.mark.parametrize("missing", ["x", "weight_hh_l0"])
def test_a_missing_gradient(missing, device):
    class Detached(Off):
        def forward(self, x):
            if missing == "x":
                return self.inner(x.detach())
            for weight in self.inner.parameters():
                weight.requires_grad_(weight is not self.inner.weight_hh_l0)
            return self.inner(x)

    problem = make_problem(CASES[0], device)
    check = Check(problem)
    with pytest.raises(RuntimeError, match=f"^no gradient for {missing}$"):  # a run records it as failed
        check(Detached(problem.twin, ""))


def test_the_errors_are_the_largest(device, monkeypatch):
    problem = make_problem(CASES[0], device)
    check = Check(problem)
    exact = check.allowance.exact
    got = {name: t.float() for name, t in exact.items()}
    got["dx"] = got["dx"] * 1.001
    got["c_n"] = got["c_n"] * 1.0001
    monkeypatch.setattr("triton_lstm.perf.check.answer", lambda *arguments: got)
    row = check(problem.twin)
    assert row["error"] == pytest.approx(1e-3, rel=1e-3) and row["reason"].startswith("dx has")
    assert row["error_share"] == worst_share(got["dx"], exact["dx"], check.allowance.own["dx"])


def test_a_case_on_which_zeros_would_pass(device):
    problem = make_problem(Case("bf16", T=1, B=2, H=4), device)
    with torch.no_grad():
        for weight in problem.twin.parameters():
            weight.mul_(1e-4)
    with pytest.raises(ValueError, match="all-zero"):
        Check(problem)


def test_a_wrong_shape_is_a_separate_error(device):
    problem = make_problem(CASES[0], device)
    with pytest.raises(RuntimeError, match="grad"):  # the cotangent does not fit; a run records it as failed
        Check(problem)(Off(problem.twin, "shape"))


def test_tf32_switches_are_restored():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    for precision in ("tf32", "fp32"):
        with contextlib.suppress(KeyError), switches(precision):
            assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is (precision == "tf32")
            raise KeyError  # put back after an error too
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


def test_ours_means_the_kernels(device):
    problem = make_problem(CASES[0], device)
    module = make(PROVIDERS[OURS], CASES[0], problem.twin)
    assert isinstance(module, triton_lstm.LSTM) and module.backend == "triton"
    assert module.weight_hh_l0.data_ptr() != problem.twin.weight_hh_l0.data_ptr()


@pytest.mark.parametrize("case", [CASES[4], CASES[5]], ids=lambda case: case.name)
def test_who_ignores_resets_is_wrong(case, device):
    problem = make_problem(case, device)
    row = Check(problem)(problem.twin)
    assert row["status"] == "wrong" and "times the allowed error" in row["reason"]


def test_reasons(device, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    why = {name: PROVIDERS[name].why_not for name in PROVIDERS}
    assert why["triton_lstm recompute"](CASES[0], device) is None
    assert "T=128" in why["step by step"](Case("fp32", T=129, B=1, H=4), device)
    assert "T=32" in why["torch.compile"](Case("fp32", T=33, B=1, H=4), device)
    assert "one layer" in why["torch.compile"](CASES[1], device)
    for name in ("step by step", "torch.compile"):
        assert {why[name](case, device) for case in CASES[4:]} == {"has no resets"}
    for name in (OURS, BASELINE):
        assert why[name](CASES[4], device) is None
    for name in ("TorchRL", "FlashRNN", "haste"):
        assert "is not installed" in why[name](CASES[0], device)


def test_a_tensor_of_another_shape_is_wrong(device, monkeypatch):
    problem = make_problem(CASES[0], device)
    checked = Check(problem)
    found = answer(problem.twin, problem, checked.allowance.draw, problem.case.dtype)
    name, tensor = next(iter(found.items()))
    monkeypatch.setattr("triton_lstm.perf.check.answer", lambda *_: found | {name: tensor[..., :-1]})
    row = checked(problem.twin)
    assert row["status"] == "wrong" and row["reason"].startswith(f"{name} is (") and ", not (" in row["reason"]
