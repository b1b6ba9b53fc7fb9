"""Training of a byte-level language model (embedding, LSTM stack, head) on real text."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from triton_lstm.system.terminal import Bar
from triton_lstm.training.config import Config
from triton_lstm.training.data import window
from triton_lstm.training.model import LanguageModel, loss_of

BETAS = (0.8, 0.95)  # Adam's; short averages, since runs have hundreds of steps
EPS = 1e-5  # Adam's; a smaller one turns rounding errors of vanishing gradients into full steps


def learning_rate(config: Config, step: int) -> float:
    """The rate at a step, counted from 0. Independent of the total number of steps, so that any run can continue."""
    share = (step + 1) / config.warmup
    return config.lr * min(share, share**-0.5)


class Trainer:
    """A model, its optimizer, and the losses so far."""

    def __init__(self, model: LanguageModel, config: Config) -> None:
        self.model, self.config = model, config
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=BETAS, eps=EPS)
        self.losses: list[float] = []

    def step(self, tokens: torch.Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, len(self.losses))
        self.optimizer.zero_grad()
        loss = loss_of(self.model, tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        return self.losses[-1]

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs to continue from here with the same losses."""
        weights, state = dict(self.model.named_parameters()), self.optimizer.state  # empty before the first step
        moments = {
            kind: {name: state[weight].get(kind, torch.zeros_like(weight)) for name, weight in weights.items()}
            for kind in ("exp_avg", "exp_avg_sq")
        }
        return {"losses": self.losses, "model": dict(self.model.state_dict()), **moments}

    def restore(self, content: dict[str, Any]) -> None:
        """content: as returned by `state`, possibly via a checkpoint."""
        self.model.load_state_dict(content["model"])
        self.losses = content["losses"]
        done = torch.tensor(float(len(self.losses)))
        states = [
            {"step": done.clone()} | {kind: content[kind][name].clone() for kind in ("exp_avg", "exp_avg_sq")}
            for name, _ in self.model.named_parameters()
        ]
        state = {"state": dict(enumerate(states)), "param_groups": self.optimizer.state_dict()["param_groups"]}
        self.optimizer.load_state_dict(state)


def train_all(
    trainers: list[Trainer],
    text: torch.Tensor,
    config: Config,
    steps: int,
    device: torch.device,
    save: Any,
    every: int,
    stop: Sequence[Any] = (),
) -> None:
    """Trains all trainers on the same batches up to step `steps`, or until `stop` is non-empty. Progress is shown for
    the first one."""
    first = trainers[0]
    begin = len(first.losses)
    with Bar(total=steps, initial=begin, unit="step") as bar:
        for step in range(begin, steps):
            tokens = window(text, config, step, device)
            start = time.perf_counter()
            loss = first.step(tokens)
            rate = config.seq_len * config.batch / (time.perf_counter() - start)
            for trainer in trainers[1:]:
                trainer.step(tokens)
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s")
            bar.update()
            if (step + 1) % every == 0 and step + 1 < steps:
                save()
            if stop:
                break


def compare(ours: list[float], theirs: list[float], exact: list[float]) -> list[dict[str, Any]]:
    """One row per step. allowed: twice nn.LSTM's largest deviation so far from nn.LSTM in float64, plus 1e-4 of the
    loss."""
    rows, spread = [], 0.0
    for step, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        if math.isfinite(b - c):
            spread = max(spread, abs(b - c))
        allowed = 2 * spread + 1e-4 * abs(b)
        ok = abs(a - b) <= allowed or (math.isnan(a) and math.isnan(b))
        rows.append(
            {
                "step": step,
                "triton_lstm": a,
                "nn.LSTM": b,
                "difference": abs(a - b),
                "allowed": allowed,
                "ok": ok,
            }
        )
    return rows
