"""A step of training, against loops in plain PyTorch."""

import dataclasses
import functools
import itertools
import math

import pytest

pytest.importorskip("pydantic", reason="the configuration needs pydantic")
import torch
from torch import nn
from torch.nn import functional as F

import triton_lstm
from triton_lstm.training.batches import Batch
from triton_lstm.training.compare import ResettingLSTM
from triton_lstm.training.config import Config, Data, Execution, Model, Optimizer
from triton_lstm.training.model import build, evaluating, held_out_loss, sample
from triton_lstm.training.text.vocabulary import Vocabulary
from triton_lstm.training.trainer import Trainer, adamw, determinism

T, B, TOKENS = 4, 3, 11
PLAIN = functools.partial(ResettingLSTM, compute=torch.float64)  # nn.LSTM
SMALL = Config(
    data=Data(batch=B, seq_len=T),
    model=Model(hidden=6, layers=2, embed=5),
    optimizer=Optimizer(steps=10, lr=0.05, warmup=2, weight_decay=0.3, clip=0.5),
    execution=Execution(dtype="fp64"),
)


def with_(config=SMALL, **fields):
    """The configuration with other values, given by their names."""
    for section in dataclasses.fields(Config):
        part = getattr(config, section.name)
        own = {name: value for name, value in fields.items() if hasattr(part, name)}
        config = dataclasses.replace(config, **{section.name: dataclasses.replace(part, **own)})
    return config


def batches(number, rows=B, resets=True, seed=0):
    """Consecutive batches of `rows` streams, with documents that begin anywhere."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(TOKENS, (number * T + 1, rows), generator=generator)
    found = []
    for step in range(number):
        inputs, targets = tokens[step * T : (step + 1) * T], tokens[step * T + 1 : (step + 1) * T + 1]
        found.append(Batch(inputs, targets.clone(), inputs == TOKENS - 1 if resets else None))
    return found


def trainer_of(config, device, lstm_class=triton_lstm.LSTM, **options):
    return Trainer(build(config, TOKENS, device, lstm_class, **options), config, device)


def test_truncated_back_propagation_through_time(interpreter):
    """States carried and detached, reset where documents begin, clipping, AdamW, the schedule: step by step by hand."""
    cpu = torch.device("cpu")
    ours = trainer_of(SMALL, cpu)
    theirs = build(SMALL, TOKENS, cpu, nn.LSTM)
    matrices = [w for name, w in theirs.named_parameters() if "weight" in name and "embed" not in name]
    others = [w for name, w in theirs.named_parameters() if "bias" in name or "embed" in name]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=False,
    )
    rates = [0.025, 0.05, 0.05, *(0.05 * (0.1 + 0.45 * (1 + math.cos(math.pi * k / 8))) for k in range(1, 8))]
    h, c = torch.zeros(2, B, 6).double(), torch.zeros(2, B, 6).double()
    seen = 0
    for rate, batch in zip(rates, batches(10), strict=True):
        total = 0
        for row in range(B):
            state = h[:, [row]].detach(), c[:, [row]].detach()
            for t in range(T):
                if batch.resets[t, row]:
                    state = None
                    seen += 1
                y, state = theirs.lstm(theirs.embed(batch.inputs[t, row].view(1, 1)), state)
                total = total + F.cross_entropy(theirs.head(y)[0], batch.targets[t, row].view(1)) / (T * B)
            h[:, [row]], c[:, [row]] = state[0].detach(), state[1].detach()
        adam.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        loss, found_norm, _ = ours.train([batch])
        torch.testing.assert_close(loss, total.detach())
        torch.testing.assert_close(found_norm, norm)
    assert seen > 5
    for ours_weight, weight in zip(ours.model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_weight, weight)


@pytest.mark.parametrize("mode", ["stream", "windows"])
def test_accumulated_batches_are_one_large_batch(mode, interpreter):
    cpu = torch.device("cpu")
    whole = trainer_of(with_(batch=2 * B, batches=mode), cpu)
    parts = trainer_of(with_(accumulate=2, batches=mode), cpu)
    for batch in batches(5, rows=2 * B):
        halves = [Batch(*(tensor[:, part * B : (part + 1) * B] for tensor in batch)) for part in range(2)]
        torch.testing.assert_close(parts.train(halves)[:2], whole.train([batch])[:2])
    for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_windows_begin_with_zeros(interpreter):
    """Unlike streams, whose second batch depends on the first one."""
    first, second = batches(2, resets=False)
    losses = {}
    for mode in ("windows", "stream"):
        config = with_(batches=mode, lr=1e-30)
        after, alone = (trainer_of(config, torch.device("cpu")) for _ in range(2))
        after.train([first])
        losses[mode] = after.train([second])[0].item(), alone.train([second])[0].item()
    assert math.isclose(*losses["windows"]) and not math.isclose(*losses["stream"], rel_tol=1e-3)


def test_clipping(interpreter):
    cpu, (batch,) = torch.device("cpu"), batches(1)
    gradients = {}
    for clip in (None, 1e9, 1e-3):
        trainer = trainer_of(with_(clip=clip), cpu)
        norm = trainer.train([batch])[1]
        grads = [weight.grad for weight in trainer.model.parameters()]
        gradients[clip] = norm.item(), nn.utils.get_total_norm(grads).item()
    assert gradients[None] == gradients[1e9] and math.isclose(*gradients[None])
    assert gradients[1e-3][0] == gradients[None][0] and math.isclose(gradients[1e-3][1], 1e-3, rel_tol=1e-3)


def test_a_schedule():
    wanted = Optimizer(steps=100, lr=2.0, warmup=4, lr_end=0.25)
    rates = [wanted.rate(step) for step in range(100)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and rates[4] == 2.0
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert math.isclose(wanted.rate(52), 1.25) and math.isclose(wanted.rate(100), 0.5) and wanted.rate(1000) == 0.5
    assert {Optimizer(schedule="constant", lr=2.0, warmup=4).rate(step) for step in (4, 99, 10**6)} == {2.0}
    assert Optimizer(warmup=0, lr=2.0).rate(0) == 2.0


def test_what_has_weight_decay():
    names = [group["names"] for group in adamw(build(SMALL, TOKENS, torch.device("cpu"), nn.LSTM), SMALL).param_groups]
    assert sorted(names[0]) == sorted(
        ["head.weight", *(f"lstm.weight_{kind}_l{layer}" for kind in ("ih", "hh") for layer in (0, 1))]
    )
    assert "embed.weight" in names[1] and all("bias" in name for name in names[1] if name != "embed.weight")


def test_a_step_that_overflows_is_left_out(interpreter):
    """With a scaled loss: neither weights nor moments change, and the scale falls."""
    trainer = trainer_of(with_(dtype="fp16"), torch.device("cpu"))
    first, second, third = batches(3)
    trainer.train([first])
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    scale = trainer.scaler.get_scale()
    trainer.scaler.update(1e38)
    trainer.train([second])
    state = trainer.state()
    assert (state["step"], state["updates"]) == (2, 1) and math.isclose(
        trainer.scaler.get_scale(), 1e38 / 2, rel_tol=1e-6
    )
    assert all(torch.equal(before[name], weight) for name, weight in trainer.model.named_parameters())
    trainer.scaler.update(scale)
    trainer.train([third])
    assert trainer.state()["updates"] == 2


@pytest.mark.parametrize("resets", [True, False])
def test_a_compiled_model_has_the_same_losses(resets, interpreter):
    config = with_(dtype="fp32")
    eager, compiled = (trainer_of(c, torch.device("cpu")) for c in (config, with_(config, compile=True)))
    found = batches(3, resets=resets)
    compiled.prepare(found[0])
    for batch in found:
        torch.testing.assert_close(compiled.train([batch])[:2], eager.train([batch])[:2])


def replayed(module, example):
    """A stand-in for torch.cuda.make_graphed_callables: inputs, outputs and gradients are in the same memory always."""
    inputs, weights = example, tuple(module.parameters())
    outputs, gradients = [], []

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            for static, new in zip(inputs, given, strict=False):
                static.copy_(new)
            with torch.enable_grad():
                ctx.results = module(*inputs)
            outputs[:] = outputs or [result.detach().clone() for result in ctx.results]
            for static, new in zip(outputs, ctx.results, strict=True):
                static.copy_(new.detach())
            return tuple(static.detach() for static in outputs)

        @staticmethod
        def backward(ctx, *given):
            found = torch.autograd.grad(ctx.results, weights, given)
            gradients[:] = gradients or [gradient.clone() for gradient in found]
            for static, new in zip(gradients, found, strict=True):
                static.copy_(new)
            return (*[None] * len(inputs), *(static.detach() for static in gradients))

    return lambda *given: Replayed.apply(*given, *weights)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_nothing_is_kept_in_the_memory_of_a_cuda_graph(accumulate, interpreter, monkeypatch):
    """Losses, states and gradients of several micro-batches survive the next replay."""
    config = with_(accumulate=accumulate)
    eager, graphs = (trainer_of(c, torch.device("cpu")) for c in (config, with_(config, cuda_graphs=True)))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", replayed)
    found = batches(6)
    graphs.prepare(found[0])
    for begin in range(0, 6, accumulate):
        step = found[begin : begin + accumulate]
        torch.testing.assert_close(graphs.train(step)[:2], eager.train(step)[:2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "dtype": "fp16"}, {"dropout": 0.3}], ids=str)
def test_cuda_graphs_have_the_same_losses(options, compile):
    if compile and "dropout" in options:
        pytest.skip("a compiled model draws other random numbers")
    device = torch.device("cuda")
    config = with_(**({"dtype": "bf16"} | options))
    graphs = with_(config, cuda_graphs=True, compile=compile)
    eager, replayed = (trainer_of(c, device) for c in (config, graphs))
    found = [batch.to(device) for batch in batches(8)]
    replayed.prepare(found[0])
    each = config.optimizer.accumulate
    for begin in range(0, 8, each):
        step = found[begin : begin + each]
        torch.testing.assert_close(replayed.train(step)[:2], eager.train(step)[:2], rtol=2e-2, atol=2e-2)


def test_recording_changes_nothing(interpreter):
    plain, recorded = (trainer_of(SMALL, torch.device("cpu")) for _ in range(2))
    for batch in batches(2):
        loss, norm, nothing = plain.train([batch])
        same_loss, same_norm, gradients = recorded.train([batch], record=True)
        assert nothing is None and torch.equal(loss, same_loss) and torch.equal(norm, same_norm)
        assert {(record.layer, record.steps) for record in gradients} == {(0, T), (1, T)}


@pytest.mark.parametrize("lstm_class", [PLAIN, triton_lstm.LSTM], ids=["nn.LSTM", "triton_lstm.LSTM"])
@pytest.mark.parametrize("mode", ["stream", "windows"])
def test_held_out_loss(mode, lstm_class):
    """Against every row of all batches as one sequence; padding does not count, and the model goes on as it did."""
    config = with_(batches=mode)
    model = build(config, TOKENS, torch.device("cpu"), lstm_class)
    found = batches(4, resets=False)
    found[-1].targets[2:, 1] = -100
    total, count = held_out_loss(model, found, config, torch.device("cpu"))
    pieces = [4 * T] if mode == "stream" else [T] * 4
    inputs, targets = (torch.cat([batch[k] for batch in found]) for k in range(2))
    expected = 0.0
    for x, y in zip(inputs.split(pieces), targets.split(pieces), strict=True):
        scores = model.head(model.lstm(model.embed(x))[0])
        expected += F.cross_entropy(scores.flatten(0, 1), y.flatten(), reduction="sum", ignore_index=-100).item()
    assert count == 4 * T * B - 2 and math.isclose(total, expected, rel_tol=1e-12)
    assert model.training and getattr(model.lstm, "backend", None) is None
    assert held_out_loss(model, found, config, torch.device("cpu"), stop=lambda: True) is None


def test_an_evaluation_leaves_the_model_as_it_was():
    model = build(SMALL, TOKENS, torch.device("cpu"), triton_lstm.LSTM)
    with evaluating(model, torch.device("cpu")):
        assert not model.training and model.lstm.backend == "torch" and not torch.is_grad_enabled()
    assert model.training and model.lstm.backend is None and torch.is_grad_enabled()


def test_samples():
    """Of a model that knows what follows: always the next letter."""
    vocabulary = Vocabulary()
    model = build(with_(dtype="fp32"), vocabulary.size, torch.device("cpu"), triton_lstm.LSTM)

    def following(tokens, state=None, resets=None):
        known = torch.where(tokens == vocabulary.end, ord("a"), tokens + 1)
        return 1e4 * F.one_hot(known, vocabulary.size).float(), state

    model.forward = following
    assert sample(model, vocabulary, 4, with_(dtype="fp32"), torch.device("cpu")) == "abcd"


def test_determinism_is_restored():
    with determinism(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    with determinism(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_both_classes_start_from_the_same_weights():
    a, b = (build(SMALL, TOKENS, torch.device("cpu"), cls) for cls in (triton_lstm.LSTM, nn.LSTM))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
