"""One step of training, and the state that a run continues from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from triton_lstm.gradients.record import record_gradients
from triton_lstm.training.batches import Batch
from triton_lstm.training.config import Config
from triton_lstm.training.model import LanguageModel, Loss, State, autocast, zero_state
from triton_lstm.training.order import random_numbers


class Trainer:
    """A model, its optimizer, and everything else that the next step depends on.

    Random numbers are a function of the seed and the step, as the batches are. So the step is their whole state.
    """

    def __init__(self, model: LanguageModel, config: Config, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        self.step = 0
        self.between_steps = True  # else an exception has interrupted one, and the state is of no use
        self.optimizer = adamw(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.execution.dtype == "fp16")
        # One for each micro-batch of a step, which has streams of its own
        self.states = [zero_state(config, device) for _ in range(config.optimizer.accumulate)]
        self._plain = Loss(model)
        self._loss: Callable[..., Any] = self._plain

    def prepare(self, batch: Batch) -> None:
        """Compiles the model, or captures it as CUDA graphs, for batches like this one, as the configuration says."""
        wanted = self.config.execution
        if wanted.cuda_graphs:
            # A replay writes gradients to the same memory again: they are added to tensors of our own
            for weight in self.model.parameters():
                weight.grad = torch.zeros_like(weight)
        if wanted.compile:
            mode = "reduce-overhead" if wanted.cuda_graphs else "default"
            self._loss = torch.compile(Loss(self.model), fullgraph=True, dynamic=False, mode=mode)
        elif wanted.cuda_graphs:
            example = tuple(tensor.clone() for tensor in self._arguments(batch, self.states[0]))  # every replay's input
            with autocast(self.config, self.device):
                self._loss = torch.cuda.make_graphed_callables(Loss(self.model), example)

    def train(self, batches: Sequence[Batch], record: bool = False) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """One step on `accumulate` micro-batches on the device.

        Returns the mean loss in nats per token, the norm of all gradients before clipping, both scalars on the device,
        and the Gradients of the first micro-batch if `record`, else None.
        """
        wanted = self.config.optimizer
        self.between_steps = False
        torch.manual_seed(int(random_numbers(self.config.execution.seed, self.step).randint(1 << 62, dtype=np.int64)))
        for group in self.optimizer.param_groups:
            group["lr"] = wanted.rate(self.step)
        self.optimizer.zero_grad(set_to_none=not self.config.execution.cuda_graphs)
        total, recorded = torch.zeros((), dtype=torch.float64, device=self.device), None
        for micro, batch in enumerate(batches):
            recording = record_gradients(self.model, reduce="norm") if record and micro == 0 else None
            with recording or contextlib.nullcontext() as found:
                total += self._backward(batch, micro, self._plain if recording else self._loss)
            recorded = recorded if found is None else found
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.between_steps = True
        return total / len(batches), norm, recorded

    def _backward(self, batch: Batch, micro: int, loss_of: Callable[..., Any]) -> torch.Tensor:
        """Adds a micro-batch's share to the gradients; carries its state on, detached. Returns its loss."""
        carried = self.config.data.batches == "stream"
        state = self.states[micro]
        if self.config.execution.compile and self.config.execution.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what the last replay returned has been used
        with autocast(self.config, self.device):
            loss, h, c = loss_of(*self._arguments(batch, state))
        self.scaler.scale(loss / self.config.optimizer.accumulate).backward()
        if carried:
            # Copied, since the next replay of a CUDA graph writes to the memory of h and c
            for old, new in zip(state, (h, c), strict=True):
                old.copy_(new.detach())
        return loss.detach()

    def _arguments(self, batch: Batch, state: State) -> tuple[torch.Tensor, ...]:
        resets = () if batch.resets is None else (batch.resets,)
        return (batch.inputs, batch.targets, *state, *resets)

    def _clip(self) -> torch.Tensor:
        """Clips the gradients, and returns their norm."""
        parameters = list(self.model.parameters())
        if self.config.optimizer.clip is not None:
            return nn.utils.clip_grad_norm_(parameters, self.config.optimizer.clip)
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to continue from here with the same losses.

        step; updates: how many steps of the optimizer did not overflow; model, exp_avg, exp_avg_sq: tensors by the
        parameter's name; states: (h, c) of every micro-batch; scaler: the loss's scale and its age, None without one.
        """
        moments: dict[str, dict[str, torch.Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
        updates = 0
        for name, weight in self.model.named_parameters():
            state = self.optimizer.state.get(weight, {})  # empty before the first step
            updates = int(state.get("step", 0))
            for kind, by_name in moments.items():
                by_name[name] = state.get(kind, torch.zeros_like(weight))
        found = self.scaler.state_dict()
        scaler = {"scale": found["scale"], "age": found["_growth_tracker"]} if found else None
        return {
            "step": self.step,
            "updates": updates,
            "model": dict(self.model.state_dict()),
            **moments,
            "states": self.states,
            "scaler": scaler,
        }

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """content: as returned by `state_dict`, possibly through a checkpoint."""
        self.step = content["step"]
        self.model.load_state_dict(content["model"])
        states = [
            {"step": torch.tensor(float(content["updates"]))}
            | {kind: content[kind][name].clone() for kind in ("exp_avg", "exp_avg_sq")}
            for group in self.optimizer.param_groups
            for name in group["names"]
        ]
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": dict(enumerate(states)), "param_groups": groups})
        self.states = [tuple(tensor.to(self.device) for tensor in state) for state in content["states"]]
        if content["scaler"] and self.scaler.is_enabled():
            scale, age = content["scaler"]["scale"], content["scaler"]["age"]
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": scale, "_growth_tracker": age})


def adamw(model: LanguageModel, config: Config) -> torch.optim.AdamW:
    """AdamW in one kernel for all parameters. Weight decay is for matrices, other than the embedding."""
    named = dict(model.named_parameters())
    decayed = [name for name, weight in named.items() if weight.ndim > 1 and not name.startswith("embed.")]
    others = [name for name in named if name not in decayed]
    wanted = config.optimizer
    groups = [
        {"params": [named[name] for name in names], "names": names, "weight_decay": decay}
        for names, decay in ((decayed, wanted.weight_decay), (others, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=wanted.lr, betas=wanted.betas, eps=wanted.eps, fused=True)


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Inside the block PyTorch uses deterministic algorithms only, if `wanted`."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it, before its first call
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
