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
from triton_lstm.training.model import LanguageModel, Loss, State, autocast, state_dtype, zero_state
from triton_lstm.training.order import random_numbers
from triton_lstm.training.parallel import mesh_of, replicate, rows_as_one, shard, whole
from triton_lstm.training.processes import Processes

MOMENTS = "exp_avg", "exp_avg_sq"  # of AdamW


class Trainer:
    """A model, its optimizer, and everything else that the next step depends on.

    Random numbers are a function of the seed, the step and the rank, as the batches are. So the step is their whole
    state.

    Args:
        model: with the same weights in all processes. With `strategy="fsdp"` it is sharded here.
        processes: which train it together, each on its rows of every batch.
    """

    def __init__(
        self, model: LanguageModel, config: Config, device: torch.device, processes: Processes | None = None
    ) -> None:
        self.model, self.config, self.device = model, config, device
        self.processes = processes or Processes()
        self.step = 0
        self.between_steps = True  # else an exception has interrupted one, and the state is of no use
        self._mesh = mesh_of(self.processes, device)
        self._sharded = self._mesh is not None and config.execution.strategy == "fsdp"
        if self._mesh is not None and self._sharded:
            shard(model, self._mesh, state_dtype(config))
        self.optimizer = adamw(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.execution.dtype == "fp16")
        # One for each micro-batch of a step, which has streams of its own
        rows = config.data.batch // self.processes.size
        self.states = [zero_state(config, device, rows) for _ in range(config.optimizer.accumulate)]
        self._step = _Step(Loss(model))
        self._loss: nn.Module = self._step

    def prepare(self, batch: Batch) -> None:
        """Compiles the model, or captures it as CUDA graphs, for batches like this one, as the configuration says."""
        wanted = self.config.execution
        if wanted.cuda_graphs:
            # A replay writes gradients to the same memory again: they are added to tensors of our own
            for weight in self.model.parameters():
                weight.grad = torch.zeros_like(weight)
        if wanted.compile:
            mode = "reduce-overhead" if wanted.cuda_graphs else "default"
            self._step.fast = (torch.compile(Loss(self.model), fullgraph=True, dynamic=False, mode=mode),)
        elif wanted.cuda_graphs:
            example = tuple(tensor.clone() for tensor in self._arguments(batch, self.states[0]))  # every replay's input
            with autocast(self.config, self.device):
                self._step.fast = (torch.cuda.make_graphed_callables(Loss(self.model), example),)
        if self.processes.group is not None and not self._sharded:
            self._loss = replicate(self._step, self.processes, self.device, keep_gradients=wanted.cuda_graphs)

    def train(self, batches: Sequence[Batch], record: bool = False) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """One step on this process's rows of `accumulate` micro-batches, on the device.

        Returns the mean loss in nats per token, the norm of all gradients before clipping, both scalars on the device
        and of all processes, and the Gradients of the first micro-batch here if `record`, else None.
        """
        wanted = self.config.optimizer
        self.between_steps = False
        keys = (self.config.execution.seed, self.step, *([self.processes.rank] if self.processes.rank else []))
        torch.manual_seed(int(random_numbers(*keys).randint(1 << 62, dtype=np.int64)))
        for group in self.optimizer.param_groups:
            group["lr"] = wanted.rate(self.step)
        self.optimizer.zero_grad(set_to_none=not self.config.execution.cuda_graphs)
        total, recorded = torch.zeros((), dtype=torch.float64, device=self.device), None
        for micro, batch in enumerate(batches):
            recording = record_gradients(self.model, reduce="norm") if record and micro == 0 else None
            last = micro == len(batches) - 1  # when DistributedDataParallel reduces the sum of the gradients
            with recording or contextlib.nullcontext() as found, self._without_reduction(not last):
                total += self._backward(batch, micro, plain=recording is not None)
            recorded = recorded if found is None else found
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.between_steps = True
        return self.processes.sum(total) / (len(batches) * self.processes.size), norm, recorded

    def _without_reduction(self, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        if wanted and isinstance(self._loss, nn.parallel.DistributedDataParallel):
            return self._loss.no_sync()
        return contextlib.nullcontext()

    def _backward(self, batch: Batch, micro: int, plain: bool) -> torch.Tensor:
        """Adds a micro-batch's share to the gradients; carries its state on, detached. Returns its loss."""
        carried = self.config.data.batches == "stream"
        state = self.states[micro]
        if self.config.execution.compile and self.config.execution.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what the last replay returned has been used
        with autocast(self.config, self.device):
            loss, h, c = self._loss(*self._arguments(batch, state), plain=plain)
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
            return whole(nn.utils.clip_grad_norm_(parameters, self.config.optimizer.clip))
        return whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))

    def state(self) -> dict[str, Any]:
        """What the next step depends on besides `tensors`.

        step; updates: how many steps of the optimizer did not overflow; scaler: the loss's scale and its age, None
        without one.
        """
        updates = max((int(state["step"]) for state in self.optimizer.state.values()), default=0)
        found = self.scaler.state_dict()
        scaler = {"scale": found["scale"], "age": found["_growth_tracker"]} if found else None
        return {"step": self.step, "updates": updates, "scaler": scaler}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights and both moments by the parameter's name, and the states of every micro-batch, (layers, batch, H): of
        all processes, as DTensors if they are spread over several."""
        tensors = {}
        for name, weight in self.model.named_parameters():
            state = self.optimizer.state.get(weight, {})  # empty before the first step
            tensors[f"model.{name}"] = weight.detach()
            for moment in MOMENTS:
                tensors[f"{moment}.{name}"] = state.get(moment, torch.zeros_like(weight, requires_grad=False))
        for micro, (h, c) in enumerate(self.states):
            tensors[f"h.{micro}"], tensors[f"c.{micro}"] = (rows_as_one(tensor, self._mesh) for tensor in (h, c))
        return tensors

    def load(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Goes on from there with the same losses.

        Args:
            state: as returned by `state`.
            tensors: as returned by `tensors`, now with what was saved; weights and states share the trainer's memory.
        """
        self.step = state["step"]
        states = [
            {"step": torch.tensor(float(state["updates"]))} | {kind: tensors[f"{kind}.{name}"] for kind in MOMENTS}
            for group in self.optimizer.param_groups
            for name in group["names"]
        ]
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": dict(enumerate(states)), "param_groups": groups})
        if state["scaler"] and self.scaler.is_enabled():
            scale, age = state["scaler"]["scale"], state["scaler"]["age"]
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": scale, "_growth_tracker": age})


class _Step(nn.Module):
    """The loss, as it is or `fast`: compiled, or from a CUDA graph. A module for DistributedDataParallel."""

    fast: tuple[Callable[..., Any], ...] = ()  # not a module of its own: it has the same weights

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *batch: torch.Tensor, plain: bool) -> Any:
        return (self.loss if plain or not self.fast else self.fast[0])(*batch)


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
