"""Random calls (tests/helpers/fuzz.py) against nn.LSTM: the same 50 in `make test`, 1,000 new ones in `make fuzz`.

A failure prints its case, and a line with @reproduce_failure that repeats it.
"""

import os

import pytest
import torch
from torch import nn

pytest.importorskip("hypothesis")
pytest.importorskip("greenlet", reason="the concurrent interpreter needs greenlet")
pytest.importorskip("triton")
from fuzz import LAYOUTS, cases
from fuzz_runs import (
    in_bfloat16,
    made,
    other,
    ours,
    planned,
    run,
    run_by_vjp,
    states_by_hand,
    states_of,
    theirs,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import triton_lstm
from triton_lstm.core.reference import Reference
from triton_lstm.core.tolerance import Allowance, draws

pytestmark = pytest.mark.usefixtures("interpreter")
CASES = int(os.environ.get("FUZZ_CASES", 0))


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(
    max_examples=max(1, (CASES or 50) // len(LAYOUTS)),
    derandomize=not CASES,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_call(layout, record_property, data):
    case = data.draw(cases(layout))
    module = made(case)
    if case.called == "autocast":
        assert_same_bits(results_of(case, module), results_of(case, module, in_bfloat16(case)))
    elif case.dtype == torch.float64:
        assert_close(case, results_of(case, module), run(case, other(case, nn.LSTM, torch.float64), theirs(case)))
        if case.return_states:
            assert_states(case, module)
    else:
        assert_within_the_rule(case, module)
    record_property("calls", 1)  # for `--record`


def results_of(case, module, call=None, number=0):
    """Of ours, run as the case says."""
    call = call or ours(case)
    with planned(case):
        if case.called == "vjp":
            return run_by_vjp(case, module, number)
        results = run(case, module, call, number)
        if case.called == "recorded":
            with triton_lstm.record_gradients(module):
                recorded = run(case, module, call, number)
            if case.layout == "cu_seqlens":  # run as resets there, whose sums have another order
                return recorded
            assert_same_bits(recorded, results)
        return results


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor is None:  # of w_hr, which c_n alone does not depend on in a single step
            assert got[name] is None, name
        else:
            assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def assert_close(case, got, expected):
    """In float64. None instead of zeros is right for a segment that is alone, and for a second gradient."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        if got[name] is None:
            assert tensor is None or case.density is not None or name.startswith("dd"), f"{name} is None"
        some = tensor if got[name] is None else got[name]
        if some is None:
            continue
        a, b = (torch.zeros_like(some) if t is None else t for t in (got[name], tensor))
        largest = b.abs().max().item() if b.numel() else 0.0
        options = dict(rtol=1e-10, atol=1e-12 * max(1.0, largest))
        torch.testing.assert_close(a, b, **options, msg=lambda text, name=name: f"{name}: {text}")


def assert_states(case, module):
    with planned(case), torch.no_grad():
        got = states_of(case, module)
    for a, b in zip(got, states_by_hand(case, module), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def assert_within_the_rule(case, module):
    """Of tolerance.py, against nn.LSTM and the reference in this dtype and in float64."""
    fewest = len(case.lengths) * case.T * min(case.I, case.options["proj_size"] or case.H)
    numbers = range(draws(fewest))

    def answers(kind, dtype):
        module = other(case, kind, dtype)
        found = [run(case, module, theirs(case), number) for number in numbers]
        return [{name: zeros_of(name, t) for name, t in results.items()} for results in found]

    def zeros_of(name, gradient):
        return torch.zeros_like(leaves[name[1:]]) if gradient is None else gradient

    leaves = case.leaves(module, 0) | dict(module.named_parameters())
    (exact, same), reference = (
        [answers(kind, dtype) for dtype in (torch.float64, case.dtype)] for kind in (nn.LSTM, Reference)
    )
    try:
        allowance = Allowance(exact, same, (reference[0], reference[1]))
    except ValueError as error:
        assume("all-zero" not in str(error))
        raise
    got = results_of(case, module, number=allowance.draw)
    assert got.keys() == same[0].keys()
    for name, tensor in got.items():
        tensor = zeros_of(name, tensor)
        assert tensor.dtype == case.dtype
        share = allowance.share(name, tensor)
        assert share <= 1, f"{name}: {share:.3g} times the error that is allowed"
