"""The exchange between programs: the real one-launch kernels under a concurrent interpreter, in many random orders."""

import pytest
import torch
import triton
import triton.language as tl
from torch import nn
from triton.runtime.interpreter import InterpreterBuilder

import triton_lstm
from triton_lstm.planning.plan import Plan

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled here; `make gpu-stress` tries their exchange", allow_module_level=True)
pytest.importorskip("greenlet", reason="the concurrent interpreter needs greenlet")

from greenlet import getcurrent
from interleave import DeadlockError, concurrent_programs, without_the_wait

from triton_lstm.kernels import exchange
from triton_lstm.kernels.launch import Layer
from triton_lstm.perf import exchange_loop
from triton_lstm.perf.exchange_loop import ExchangeLoop
from triton_lstm.perf.stress import stress_case

pytestmark = pytest.mark.usefixtures("interpreter")
SHAPES = [(3, 33), (1, 32)]  # B, H: masked rows and columns; none masked but rows
SEEDS = 20


def plan(kind: str, **fields) -> Plan:
    defaults = dict(block_b=16, block_h=16, block_k=16, slices=1, groups=1, warps=4, resident=True)
    return Plan(exchange=kind, one_launch=True, **(defaults | fields))


def run(module, x, cotangents, backward_seed=None, forward_seed=None, switches=0.5):
    """Output and all gradients; a seed makes that pass concurrent."""

    def maybe(seed):
        return concurrent_programs(seed, switches) if seed is not None else torch.enable_grad()

    x = x.clone().requires_grad_()
    module.zero_grad()
    with maybe(forward_seed):
        y, (h_n, c_n) = module(x)
    with maybe(backward_seed):
        torch.autograd.backward([y, h_n, c_n], cotangents)
    return [y.detach(), h_n.detach(), c_n.detach(), x.grad, *(p.grad for p in module.parameters())]


def problem(B, H, T=4, dtype=torch.float32, scale=1.0):
    torch.manual_seed(0)
    module = triton_lstm.LSTM(5, H, dtype=dtype, backend="triton")
    twin = nn.LSTM(5, H, dtype=dtype)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(T, B, 5, dtype=dtype)
    cotangents = [torch.randn(s, dtype=dtype) for s in ((T, B, H), (1, B, H), (1, B, H))]
    return module, twin, x, cotangents


def mismatch(got, expected) -> float:
    return max((a - b).abs().nan_to_num(nan=torch.inf).max().item() for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("B, H", SHAPES)
@pytest.mark.parametrize("kind", ["flag", "barrier"])
@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_any_order_gives_the_answer(kind, B, H, passes, monkeypatch):
    module, twin, x, cotangents = problem(B, H)
    expected = run(twin, x, cotangents)
    alone = Plan("none", True, True, 4, 64, 64, 1, 1, 4)
    for seed in range(SEEDS):
        fields = dict(slices=1 + seed % 2, resident=seed % 3 > 0, block_h=8 if seed % 5 == 0 else 16)
        concurrent = plan(kind, **fields)
        monkeypatch.setattr(
            "triton_lstm.operator.layer.plan_for",
            lambda *_, backward, c=concurrent: c if backward == (passes == "backward") else alone,
        )
        got = run(module, x, cotangents, **{f"{passes}_seed": seed})
        assert mismatch(got, expected) < 1e-5, f"seed {seed}"


@pytest.mark.parametrize("passes", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["flag", "barrier"])
def test_without_the_wait_the_answer_is_wrong(kind, passes, monkeypatch):
    """The proof that the test above can fail: the same run, its readers told that everything has arrived."""
    module, twin, x, cotangents = problem(3, 33)
    expected = run(twin, x, cotangents)
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: plan(kind))
    correct = dict(forward_seed=0, backward_seed=0)
    assert mismatch(run(module, x, cotangents, **correct), expected) < 1e-5
    without_the_wait(monkeypatch)
    wrong = [mismatch(run(module, x, cotangents, seed, seed), expected) > 1e-2 for seed in range(6)]
    assert sum(wrong) >= 2, f"only {sum(wrong)} of 6 orders were wrong"


def arrive_before_the_last_store(passes, monkeypatch):
    """Every program of this pass, in every step; the other pass has one program."""
    alone = Plan("none", True, True, 4, 64, 64, 1, 1, 4)
    monkeypatch.setattr(
        "triton_lstm.operator.layer.plan_for",
        lambda *_, backward: plan("flag") if backward == (passes == "backward") else alone,
    )
    store, arrive, stores = exchange.store_rows, exchange.arrive, {}

    def keep(*args):
        program = getcurrent()
        if program in stores:
            store(*stores[program])
        stores[program] = args

    def arrive_first(*args):
        arrive(*args)
        store(*stores.pop(getcurrent()))

    monkeypatch.setattr(f"triton_lstm.kernels.{passes}.store_rows", keep)
    monkeypatch.setattr(f"triton_lstm.kernels.{passes}.arrive", arrive_first)


@pytest.mark.parametrize("missed", ["wait", "missing", None])
@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_a_count_promises_nothing_of_the_rows(passes, missed, monkeypatch):
    """The look at the rows is enough, also alone."""
    module, twin, x, cotangents = problem(3, 33)
    expected = run(twin, x, cotangents)
    arrive_before_the_last_store(passes, monkeypatch)
    if missed:
        monkeypatch.setattr(exchange, missed, lambda *_: 0)
    wrong = [mismatch(run(module, x, cotangents, **{f"{passes}_seed": seed}), expected) > 1e-2 for seed in range(10)]
    assert any(wrong) if missed == "missing" else not any(wrong)


@pytest.mark.parametrize("kind", ["flag", "barrier"])
def test_the_bare_exchange_of_the_benchmarks(kind, monkeypatch):
    loop = ExchangeLoop(3, 4, kind, torch.device("cpu"), one_launch=True)
    for seed in range(5):
        loop.buffer.fill_(torch.nan)
        with concurrent_programs(seed):
            loop.run()
        assert loop.complete()
    monkeypatch.setattr(exchange_loop, "await_rows", lambda *_: 0)  # told that all is there, programs see what is not
    seen = []
    for seed in range(6):
        with concurrent_programs(seed):
            loop.run()
        seen.append(loop.complete())
    assert not all(seen)


@pytest.mark.parametrize("variant", ["", "both directions", "packed", "split sums"])
@pytest.mark.parametrize("kind", ["none", "flag", "barrier"])
def test_the_stress_run_counts_what_differs(kind, variant, monkeypatch):
    def wrong(seed):
        with concurrent_programs(seed):
            row = stress_case(kind, "fp32", 3, 33, 1, variant, T=3, device=torch.device("cpu"))
        return row["wrong_backward"] + (0 if variant == "split sums" else row["wrong_forward"])

    assert wrong(seed=0) == 0
    if kind != "none":
        without_the_wait(monkeypatch)
        assert sum(wrong(seed) for seed in range(3)) > 0


@pytest.mark.parametrize("kind", ["flag", "barrier"])
def test_groups_take_tiles_in_turn(kind, monkeypatch):
    module, twin, x, cotangents = problem(40, 24, T=3)
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: plan(kind, groups=2))
    assert mismatch(run(module, x, cotangents, 1, 2), run(twin, x, cotangents)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_widths_of_the_flag(dtype, monkeypatch):
    module, twin, x, cotangents = problem(3, 33, dtype=dtype)
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: plan("flag"))
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-12}[dtype]
    for seed in range(3):
        assert mismatch(run(module, x, cotangents, seed, seed), run(twin, x, cotangents)) < tolerance


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["flag", "barrier"])
def test_nonfinite_values_hang_nobody(kind, value, monkeypatch):
    """NaN data look like data not yet written; overflown cotangents come from every GradScaler."""
    module, twin, x, cotangents = problem(3, 33)
    x[1, 0, 0] = value
    cotangents[0][2, 1, 5] = value
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: plan(kind))
    got, expected = run(module, x, cotangents, 3, 4), run(twin, x, cotangents)
    torch.testing.assert_close(got[0], expected[0], equal_nan=True)
    torch.testing.assert_close(got[3][:, 2], expected[3][:, 2])  # dx of the row that holds nothing special
    assert got[3][:, 2].isfinite().all()


@triton.jit
def copy_kernel(src_ptr, dst_ptr, N: tl.constexpr, LAYER: tl.constexpr):
    offs = tl.arange(0, N)
    exchange.store_rows(dst_ptr + offs, tl.load(src_ptr + offs), offs < N, LAYER)


@pytest.mark.parametrize("kind", ["flag", "barrier"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_sentinel_is_never_stored(dtype, kind):
    """A NaN with its very bits is stored as another NaN, everything else as it is; by the barrier everything is."""
    size = dtype.itemsize
    bits = exchange.INT_TYPE[size][0]
    source = torch.tensor([1.5, float("nan"), float("-inf"), 0.0], dtype=dtype)
    source.view(bits)[3] = exchange.SENTINEL
    stored = torch.zeros(4, dtype=dtype)
    copy_kernel[(1,)](source, stored, 4, Layer.of(kind, dtype, 4, 1, "ieee", 0, False, "cuda"))
    assert torch.equal(stored[:3].view(bits), source[:3].view(bits))
    assert stored[3].isnan()
    assert (stored.view(bits)[3] != exchange.SENTINEL) == (kind == "flag")


@triton.jit
def missing_kernel(rows_ptr, found_ptr, live, LAYER: tl.constexpr, TILE: tl.constexpr):
    tl.store(found_ptr, exchange.missing(rows_ptr, live, None, LAYER, TILE))


@pytest.mark.parametrize("place, found", [(None, 0), ((0, 0), 1), ((1, 16), 1), ((2, 32), 1), ((3, 5), 0)])
def test_a_sentinel_is_found_wherever_it_is(place, found):
    """In 3 rows of 33, three chunks; the fourth row does not count."""
    rows, result = torch.zeros(4, 33), torch.zeros(1, dtype=torch.int32)
    if place:
        rows.view(torch.int32)[place] = exchange.SENTINEL
    layer = Layer.of("flag", torch.float32, 33, 1, "ieee", 0, False, "cuda")
    missing_kernel[(1,)](rows, result, 3, layer, plan("flag").tile)
    assert result.item() == found


def test_nobody_waits_for_h0(monkeypatch):
    """An initial state that holds the sentinel's bits is data."""
    module, _, x, _ = problem(1, 32)
    h0 = torch.zeros(1, 1, 32)
    h0.view(torch.int32)[0, 0, 3] = exchange.SENTINEL
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: plan("flag"))
    with torch.no_grad(), concurrent_programs(0):
        assert module(x, (h0, torch.zeros(1, 1, 32)))[0].isnan().all()


@pytest.mark.parametrize("kind", ["flag", "barrier"])
def test_a_deadlock_is_seen(kind, monkeypatch):
    """Without `arrive` everybody waits for ever, and the scheduler says so."""
    module, _, x, cotangents = problem(1, 32)
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: plan(kind))
    monkeypatch.setattr("triton_lstm.kernels.forward.arrive", lambda *_: None)
    with pytest.raises(DeadlockError):
        run(module, x, cotangents, forward_seed=0)


@pytest.mark.parametrize("passes", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["flag", "barrier"])
def test_a_bounded_wait_gives_up_and_says_so(kind, passes, monkeypatch):
    """Also where all that is waited for later is there: of a program's two batch tiles one misses two arrivals.

    After LIMIT looks nothing is waited for any more: each later step has a single look.
    """
    LIMIT, T, TILES = 7, 4, 2
    module, _, x, cotangents = problem(B=20, H=16, T=T)
    alone = Plan("none", True, True, 32, 16, 16, 1, 1, 4)
    plans = {passes: plan(kind), "backward" if passes == "forward" else "forward": alone}
    monkeypatch.setattr(
        "triton_lstm.operator.layer.plan_for", lambda *_, backward: plans["backward" if backward else "forward"]
    )
    monkeypatch.setenv("TRITON_LSTM_SPIN_LIMIT", str(LIMIT))
    run(module, x, cotangents)  # in time
    looks, arrivals = [], []

    def forgetful(*args):
        if len(arrivals) not in (0, 2):
            exchange.arrive(*args)
        arrivals.append(args)

    atomic = InterpreterBuilder.create_atomic_rmw
    monkeypatch.setattr(f"triton_lstm.kernels.{passes}.arrive", forgetful)
    monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", lambda *a: looks.append(a) or atomic(*a))
    says = pytest.raises(RuntimeError, match=f"TRITON_LSTM_SPIN_LIMIT={LIMIT} times")
    if passes == "forward":
        with says:
            module(x)
    else:
        y, (h_n, c_n) = module(x)
        with says:
            torch.autograd.backward([y, h_n, c_n], cotangents)
    assert len(arrivals) == T * TILES
    # Every step's, the first tile's second one LIMIT times, and the arrivals themselves
    assert len(looks) == TILES * T + LIMIT - 1 + TILES * T - 2


@pytest.mark.parametrize("limit", ["1000000", "0"])  # 0: none
def test_a_wait_bounded_or_not_looks_for_rows_more_than_once(limit, monkeypatch):
    module, twin, x, cotangents = problem(3, 33)
    arrive_before_the_last_store("forward", monkeypatch)
    monkeypatch.setenv("TRITON_LSTM_SPIN_LIMIT", limit)
    for seed in range(10):
        assert mismatch(run(module, x, cotangents, forward_seed=seed), run(twin, x, cotangents)) < 1e-5


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_rows_that_never_come_are_no_hang_under_a_limit(passes, monkeypatch):
    module, _, x, cotangents = problem(B=3, H=16)
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: plan("flag"))
    monkeypatch.setenv("TRITON_LSTM_SPIN_LIMIT", "7")
    monkeypatch.setattr(f"triton_lstm.kernels.{passes}.store_rows", lambda *_: None)
    with pytest.raises(RuntimeError, match="TRITON_LSTM_SPIN_LIMIT=7 times"):
        run(module, x, cotangents)


@pytest.mark.parametrize("limit", [1, 2, 4, 5])
def test_an_honest_nan_is_no_timeout(limit, monkeypatch):
    module, twin, x, cotangents = problem(3, 16)  # a single program, which waits for nobody
    x[1, 0, 0] = torch.nan
    monkeypatch.setattr("triton_lstm.operator.layer.plan_for", lambda *_, backward: plan("flag"))
    monkeypatch.setenv("TRITON_LSTM_SPIN_LIMIT", str(limit))
    got, expected = run(module, x, cotangents), run(twin, x, cotangents)
    torch.testing.assert_close(got[0], expected[0], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sentinels(dtype):
    buffer = torch.zeros(7, dtype=dtype)
    exchange.fill_with_sentinel(buffer)
    size = dtype.itemsize
    assert buffer.isnan().all()
    assert (buffer.clone().view(exchange.INT_TYPE[size][0]) == exchange.SENTINEL).all()
