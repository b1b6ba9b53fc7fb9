"""How well the cost model orders plans: the numbers, on times made for it, and what was stored."""

import csv
import dataclasses
import subprocess
import sys

import pytest

from triton_lstm.perf.step import agreement as module
from triton_lstm.perf.step import loops as stored
from triton_lstm.perf.step.agreement import agreement, fit, table
from triton_lstm.perf.step.loops import TimeLoop, plans, problems, read_measured, read_modelled, write
from triton_lstm.planning.cost import FITTED, cost
from triton_lstm.planning.devices import GPUS
from triton_lstm.planning.limits import why_not
from triton_lstm.planning.problem import Problem

PROBLEM = Problem(GPUS["H100"], "bf16", 64, 512, False)
PLANS = plans(PROBLEM)


@pytest.fixture(scope="module")
def modelled():
    return read_modelled()


def loops(times):
    return [TimeLoop(PROBLEM, plan, us) for plan, us in zip(PLANS, times, strict=False)]


def test_orders():
    times = [1.0, 2.0, 3.0, 4.0, 5.0]
    right = agreement(loops(times), [10, 20, 30, 40, 50])
    assert right["spearman"] == pytest.approx(1) and right["above_0.9"] == right["within_5%"] == 1
    assert right["loss"] == 0
    assert right["error"] == pytest.approx(2.302585)  # log 10
    turned = agreement(loops(times), times[::-1])
    assert turned["spearman"] == pytest.approx(-1) and turned["within_5%"] == 0
    assert turned["loss"] == turned["most"] == 4
    nearly = agreement(loops([1.04, 1.0, 3.0, 4.0, 5.0]), times)
    assert nearly["spearman"] == pytest.approx(0.9) and nearly["within_5%"] == 1


def test_problems_with_few_loops_do_not_count():
    few = [TimeLoop(PROBLEM._replace(B=16), plan, 1.0) for plan in PLANS[:4]]
    found = agreement(loops([1, 2, 3, 4, 5]) + few, [1, 2, 3, 4, 5, 4, 3, 2, 1])
    assert found["problems"] == 1 and found["spearman"] == pytest.approx(1) and found["loops"] == 9


def test_a_fit_finds_the_constants_that_made_the_times():
    pytest.importorskip("scipy")
    made = dataclasses.replace(FITTED, step=2.0, sliced=0.05, cell=0.8)
    several = [problem for problem in problems() if not problem.backward][:12]
    times = [TimeLoop(problem, plan, cost(problem, plan, made).us) for problem in several for plan in plans(problem)]
    found = fit(times[::2], times[1::2])
    for name in ("step", "sliced", "cell"):
        assert getattr(found, name) == pytest.approx(getattr(made, name), rel=0.05), name


def test_what_is_written_is_read(tmp_path, capsys):
    made = [TimeLoop(PROBLEM, plan, 1.5 + k, k) for k, plan in enumerate(PLANS)]
    path = tmp_path / "new" / "loops.csv"
    assert read_modelled(path) == []
    with pytest.raises(ValueError, match="no kernel could be modelled"):
        write(path, ["sm_100: there is no model"])
    write(path, ["sm_100: there is no model", *made])
    assert read_modelled(path) == made
    assert "there is no model" in capsys.readouterr().err
    path.write_text(path.read_text().replace("warps", "wraps"))
    with pytest.raises(ValueError, match="has no warps in some row; delete it"):
        read_modelled(path)


def test_plans_to_compile():
    """Some that are expected to spill as well, else nobody would know if they did not."""
    assert len(problems()) == len(set(problems())) > stored.PROBLEMS
    every = [(problem, plan) for problem in problems() for plan in plans(problem)]
    assert len(every) == len(set(every)) > 700
    assert any(why_not(*of) for of in every) and any(why_not(*of) is None for of in every)


def test_no_plan_that_is_chosen_spills(modelled):
    spilling = [loop for loop in modelled if loop.local and why_not(loop.problem, loop.plan) is None]
    assert spilling == []
    kept = [loop for loop in modelled if not loop.local]
    allowed = [loop for loop in kept if why_not(loop.problem, loop.plan) is None]
    assert len(allowed) > 0.75 * len(kept)


def test_the_order_of_stored_loops(modelled):
    """Close below what perf/README.md says."""
    found = table(read_measured(), modelled)
    assert found.loc["measured", "problems"] == 36 and found.loc["modelled", "problems"] > 60
    assert (found.loc[["measured", "modelled"], "spearman"] > [0.85, 0.85]).all(), found.to_string()
    assert (found.loc[["measured", "modelled"], "loss"] < [0.04, 0.05]).all(), found.to_string()


def test_command():
    command = [sys.executable, "-m", "triton_lstm.perf.step.agreement", "--stored"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "NVIDIA H100" in done.stdout, done.stderr


@pytest.mark.parametrize("text, wrong", [("gpu,dtype\nH100,bf16\n", "delete it"), (None, "needs scipy")])
def test_what_cannot_be_compared_is_said(text, wrong, tmp_path, monkeypatch, capsys):
    path = tmp_path / "loops.csv"
    if text:
        path.write_text(text)
    monkeypatch.setattr(module, "read_modelled", lambda: read_modelled(path))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["agreement", "--stored", *([] if text else ["--fit"])])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert wrong in capsys.readouterr().err


def test_measured_loops_are_of_the_present_kernels():
    found = read_measured()
    assert len(found) == 520 and all(loop.problem.device == GPUS["H200"] for loop in found)
    assert any(loop.plan.splits > 1 for loop in found) and any(not loop.plan.resident for loop in found)


def test_a_plan_that_cannot_be_read_is_named(tmp_path):
    text = stored.MEASURED.read_text()
    plan = read_line(text)["plan"]
    (tmp_path / "loops.csv").write_text(text.replace(plan, "flag 16x?"))
    with pytest.raises(ValueError, match=r"cannot read the plan 'flag 16x\?'"):
        read_measured(tmp_path / "loops.csv")


def read_line(text):
    """The first row of the present kernels."""
    return next(row for row in csv.DictReader(text.splitlines()) if row["kernels"] == "now")
