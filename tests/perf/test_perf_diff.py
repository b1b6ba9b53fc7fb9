"""Differences between two sets of results: noise, regressions, and what cannot be compared."""

import math

import pandas as pd
import pytest
from frames import ABOUT, OURS, THEIRS, make

from triton_lstm.perf.cases import Case
from triton_lstm.perf.diff import FASTER, LOST, NEW, NOT_RUN, SAME, SLOWER, compare
from triton_lstm.perf.results import derive, describe, select
from triton_lstm.settings import UsageError


def diff(before, after):
    return compare(before, after).set_index(["case", "mode"])


def test_the_same_results_do_not_differ():
    frame = make([2.0, 0.5])
    assert set(compare(frame, frame)["verdict"]) == {SAME} and len(compare(frame, frame)) == 4


@pytest.mark.parametrize(
    "factor, spread, expected",
    [  # noise: twice the square root of four squared spreads
        (1.029, 0.0, SAME),
        (1.031, 0.0, SLOWER),
        (0.98, 0.0, SAME),
        (0.96, 0.0, FASTER),
        (1.07, 0.02, SAME),
        (1.09, 0.02, SLOWER),
        (0.93, 0.02, SAME),
        (0.92, 0.02, FASTER),
    ],
)
def test_a_change_counts_when_it_is_larger_than_the_noise(factor, spread, expected):
    case = Case("bf16", T=100, B=8, H=64)
    before, after = (make([s], [case], spread=spread) for s in (1.0, 1.0 / factor))
    found = diff(before, after).loc[case.name, "inference"]
    assert found["verdict"] == expected and found["ratio"] == pytest.approx(factor)
    assert found["noise"] == pytest.approx(max(0.03, 4 * spread))


@pytest.mark.parametrize("name", ["torch", "cudnn", "driver", "algorithm"])
def test_another_nn_lstm_is_not_a_baseline(name):
    """nn.LSTM became faster by an update: this is not a regression of ours, and does not hide one."""
    before, after = make([2.0]), make([2.0])
    theirs = after["provider"] == THEIRS
    after.loc[theirs, ["ms", "p20", "p80"]] *= 0.5
    assert set(compare(before, after)["verdict"]) == {SLOWER}
    after.loc[theirs if name == "algorithm" else slice(None), name] = "another"
    assert set(compare(before, after)["verdict"]) == {SAME} and set(compare(before, after)["against"]) == {"time"}


def test_rows_missing_from_the_second_set_are_listed():
    before = make([2.0, 2.0])
    first = before["case"].iloc[0]
    found = compare(before, before[before["case"] != first])
    assert found[found["case"] == first]["verdict"].tolist() == [NOT_RUN, NOT_RUN]


def test_a_slower_machine_is_not_a_regression():
    before, after = make([2.0]), make([2.0])
    after[["ms", "p20", "p80"]] *= 1.5
    assert set(compare(before, after)["verdict"]) == {SAME} and set(compare(before, after)["against"]) == {THEIRS}
    ours = [select(frame, {"provider": [OURS]}) for frame in (before, after)]
    assert set(compare(*ours)["verdict"]) == {SLOWER} and set(compare(*ours)["against"]) == {"time"}


def test_a_lost_time_is_a_regression():
    before, after = make([2.0, 2.0]), make([2.0, 2.0])
    first = after["case"].iloc[0]
    bad = describe(Case("bf16", T=100, B=8, H=64), OURS, "all", math.nan) | {"status": "failed", "reason": "boom"}
    left = after[(after["case"] != first) | (after["provider"] != OURS)]
    after = derive(pd.concat([left, pd.DataFrame([bad | ABOUT])]))
    found = compare(before, after)
    assert found[found["case"] == first]["verdict"].tolist() == [LOST, LOST]
    assert found[found["case"] == first]["reason"].tolist() == ["failed: boom"] * 2
    assert set(compare(after, before).query("case == @first")["verdict"]) == {NEW}


def test_single_measurements_are_noisy():
    before, after = (make([s], runs=1, spread=0.0) for s in (1.0, 0.8))
    assert set(compare(before, after)["verdict"]) == {SAME}


def test_results_that_cannot_be_compared():
    with pytest.raises(UsageError, match="cannot be compared"):
        compare(make([1.0]), make([1.0]).assign(gpu="Another"))
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(make([1.0]), make([1.0], [Case("fp16", T=1, B=1, H=1)]))
