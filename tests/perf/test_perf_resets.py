"""Cases with resets: which rows they are, and nn.LSTM on split and packed sequences."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import triton_lstm
from triton_lstm.perf.cases import Case
from triton_lstm.perf.check import make_problem
from triton_lstm.perf.providers import OURS, PROVIDERS, make
from triton_lstm.perf.results import BASELINE
from triton_lstm.perf.split import Split
from triton_lstm.perf.work import segments_of

CASE = Case("fp64", T=7, B=4, H=5, I=3, resets=0.2)
CASES = [
    CASE,
    dataclasses.replace(CASE, batch_first=True),
    dataclasses.replace(CASE, bidirectional=True),
    dataclasses.replace(CASE, bidirectional=True, layers=2, batch_first=True, proj_size=2),
    dataclasses.replace(CASE, resets=1.0, layers=2),  # every segment is a step
    dataclasses.replace(CASE, resets=0.04),  # one reset
    dataclasses.replace(CASE, resets=0.0, bidirectional=True),
]


def alone(case, twin, x):
    """Every segment in a call of its own: output, h_n, c_n, and the lengths of the segments."""
    resets = case.reset_rows() if case.batch_first else case.reset_rows().t()
    x = x if case.batch_first else x.transpose(0, 1)
    y, h_n, c_n, lengths = torch.zeros(case.B, case.T, case.directions * (case.proj_size or case.H)).to(x), [], [], []
    for b in range(case.B):
        edges = [0, *(t for t in range(1, case.T) if resets[b, t]), case.T]
        states = []
        for begin, end in itertools.pairwise(edges):
            piece = x[b, begin:end].unsqueeze(0 if case.batch_first else 1)
            part, state = twin(piece)
            y[b, begin:end] = part.flatten(0, 1)
            states.append(state)
            lengths.append(end - begin)
        for of_all, k in ((h_n, 0), (c_n, 1)):
            first, last = states[0][k][:, 0], states[-1][k][:, 0]
            forward = torch.arange(len(first), device=x.device) % case.directions == 0
            of_all.append(torch.where(forward[:, None], last, first))
    return y if case.batch_first else y.transpose(0, 1), torch.stack(h_n, 1), torch.stack(c_n, 1), lengths


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_split_is_every_segment_alone(case, device):
    problem = make_problem(case, device)
    x, twin = problem.inputs[0].requires_grad_(), problem.twin
    wanted = [x, *twin.parameters()]
    *expected, lengths = alone(case, twin, x)
    y, states = Split(case, twin)(x)
    got = [y, *states]
    weighted = [
        (problem.cotangents[0] * out[0]).sum() + out[1].sum() + out[2].square().sum() for out in (expected, got)
    ]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(loss, wanted) for loss in weighted), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-11)
    assert segments_of(case).tolist() == lengths
    assert len(lengths) == case.B + case.reset_rows().sum()


def test_the_rows_of_resets():
    fractions = (0.0, 0.001, 0.01, 0.1)
    rows = [Case("bf16", T=128, B=64, H=4, resets=fraction).reset_rows() for fraction in fractions]
    assert [int(r.sum()) for r in rows] == [0, 8, 82, 819]
    assert all(r.shape == (128, 64) and r.dtype == torch.bool and not r[0].any() for r in rows)
    assert all((fewer <= more).all() for fewer, more in itertools.pairwise(rows))
    spread = rows[3].double()
    assert spread.mean(1)[1:].std() < 0.06 and 0.05 < spread.mean(0).min() < spread.mean(0).max() < 0.2
    same = Case("fp16", T=128, B=64, H=9, batch_first=True, resets=0.1).reset_rows()
    assert torch.equal(same.t(), rows[3]) and same.is_contiguous()
    assert not Case("bf16", T=3, B=2, H=4).reset_rows().any()
    assert Case("bf16", T=3, B=2, H=4, resets=1.0).reset_rows().sum() == 4  # all after the first step
    assert Case("bf16", T=1, B=2, H=4, resets=0.5).reset_rows().sum() == 0


def test_names():
    names = [dataclasses.replace(CASE, resets=resets).name for resets in (None, 0.0, 0.001, 0.01, 0.1)]
    assert names == ["fp64-T7-B4-I3-H5" + end for end in ("", "-resets0%", "-resets0.1%", "-resets1%", "-resets10%")]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(resets=-0.1), "a fraction of the rows, from 0 to 1, got -0.1"),
        (dict(resets=10), "from 0 to 1, got 10"),
        (dict(resets=float("nan")), "got nan"),
        (dict(resets=0.0, packed=True), "a case has resets or is packed"),
    ],
)
def test_what_is_no_case(fields, message):
    with pytest.raises(ValueError, match=message):
        Case("fp32", T=3, B=2, H=4, **fields)


class Seen(nn.LSTM):
    """Notes what it is called with."""

    def forward(self, x):
        self.seen = x
        return super().forward(x)


def test_every_call_reads_the_resets(device):
    """And packs only if one is set."""
    problem = make_problem(CASE, device)
    inner = Seen(**CASE.module_arguments).to(device, CASE.dtype)
    x, module = problem.inputs[0], Split(CASE, inner)
    module(x)
    assert isinstance(inner.seen, PackedSequence)
    assert inner.seen.batch_sizes.tolist() == [
        int((segments_of(CASE) > t).sum()) for t in range(segments_of(CASE).max())
    ]
    module.resets.zero_()
    module.resets[0] = True  # nothing is before it
    y, _ = module(x)
    assert inner.seen is x and torch.equal(y, inner(x)[0])


def test_who_is_given_them(device):
    case = dataclasses.replace(CASE, precision="fp32", batch_first=True)
    problem = make_problem(case, device)
    for name in (OURS, "triton_lstm recompute"):
        module = make(PROVIDERS[name], case, problem.twin)
        assert isinstance(module.inner, triton_lstm.LSTM) and module.inner.backend == "triton"
        assert module.inner.recompute == name.endswith("recompute")
        assert torch.equal(module.resets.cpu(), case.reset_rows()) and module.resets.device.type == device.type
    assert isinstance(make(PROVIDERS[BASELINE], case, problem.twin), Split)
    none_set, none_given = (dataclasses.replace(case, resets=resets) for resets in (0.0, None))
    assert not make(PROVIDERS[OURS], none_set, problem.twin).resets.any()
    assert isinstance(make(PROVIDERS[OURS], none_given, problem.twin), triton_lstm.LSTM)
    assert isinstance(make(PROVIDERS[BASELINE], none_given, problem.twin), nn.LSTM)
    assert "reads them, splits and packs" in PROVIDERS[BASELINE].about
