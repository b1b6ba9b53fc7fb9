"""One provider on one case: the timing of each mode, and the memory of a call."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from triton_lstm.perf.cases import MODES, Case
from triton_lstm.perf.check import Problem, data, leaf
from triton_lstm.perf.clock import host_times_ms, times_after_ms, times_ms

TURNS = 3  # of every provider and mode; the providers alternate
COLD_LIMIT_S = 120
Turn = Callable[[], list[float]]


class UnsupportedModeError(Exception):
    """A mode that this device does not support; the message says why."""


class Runner:
    """A provider's module on a case's data. No mode affects another one."""

    def __init__(self, problem: Problem, module: nn.Module, provider: str) -> None:
        self.case, self.module, self.provider = problem.case, module, provider
        self.x, self.x_leaf = leaf(problem.inputs[0], problem.case.dtype)
        self.dy = problem.cotangents[0]
        self.leaves = [self.x_leaf, *module.parameters()]
        self.on_gpu = self.x_leaf.device.type == "cuda"
        self.caches: tempfile.TemporaryDirectory[str] | None = None  # filled by a cold start

    def turn(self, name: str) -> Turn:
        """A function that measures one turn of a mode and returns the times of its calls in ms.

        Raises UnsupportedModeError if this device does not support the mode.
        """
        mode = MODES[name]
        if mode.timer == "cold":
            return self.cached_start_ms if name == "cold_cached" else self.cold_start_ms
        self.module.train(mode.grad)
        if mode.timer == "graph":
            return functools.partial(times_ms, self.captured_step().replay)
        if not mode.forward:
            return lambda: times_after_ms(self.forward, self.backward)
        call = self.call(name)
        if mode.timer == "host":
            return lambda: host_times_ms(call)
        return functools.partial(times_ms, call, clear=self.leaves)

    def call(self, name: str) -> Callable[[], Any]:
        """A function that executes the mode once, including the forward pass if the mode is backward alone."""
        mode = MODES[name]
        return self.inference if not mode.grad else self.both if mode.backward else self.forward

    def forward(self) -> torch.Tensor:
        """The output, with its autograd graph."""
        return data(self.module(self.x)[0])

    def inference(self) -> None:
        """A call without autograd."""
        with torch.no_grad():
            self.module(self.x)

    def backward(self, y: torch.Tensor) -> None:
        """Computes new gradients of the input and of all parameters."""
        for tensor in self.leaves:
            tensor.grad = None
        y.backward(self.dy)

    def both(self) -> None:
        """Forward and backward."""
        self.backward(self.forward())

    def captured_step(self) -> Any:
        """A training step as a CUDA graph, checked; the learning rate is 0, so that the weights do not change.

        Raises UnsupportedModeError without a GPU, RuntimeError if a replay gives a different gradient than a call.
        """
        if not self.on_gpu:
            raise UnsupportedModeError("CUDA graphs need a GPU")
        optimizer = torch.optim.SGD(self.module.parameters(), lr=0.0, foreach=True)

        def train() -> None:
            self.both()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # as the documentation of torch.cuda.graph recommends
                train()
        torch.cuda.current_stream().wait_stream(side)
        expected = self.gradient().clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            train()
        self.gradient().zero_()
        graph.replay()
        if not torch.allclose(self.gradient(), expected, rtol=1e-2, atol=1e-2):
            raise RuntimeError("the replay of the graph gives a different gradient than a call")
        return graph

    def gradient(self) -> torch.Tensor:
        """The gradient of the input, from the last backward pass."""
        assert self.x_leaf.grad is not None
        return self.x_leaf.grad

    def peak_mb(self, name: str) -> float:
        """The peak memory that a call allocates, in 2**20 bytes, by torch's counters.

        NaN on the CPU, and for modes that are not timed on the device.
        """
        if MODES[name].timer != "device" or not self.on_gpu:
            return math.nan
        call = self.call(name)
        self.module.train(MODES[name].grad)
        call()  # excludes what is compiled or cached on the first call
        for tensor in self.leaves:
            tensor.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def cold_start_ms(self) -> list[float]:
        """The first forward and backward of a new process with empty caches, which it fills."""
        self.caches = tempfile.TemporaryDirectory()
        return [first_call_ms(self.case, self.provider, self.caches.name)]

    def cached_start_ms(self) -> list[float]:
        """Likewise, with the caches filled by a cold start."""
        if self.caches is None:
            self.cold_start_ms()
        assert self.caches is not None
        return [first_call_ms(self.case, self.provider, self.caches.name)]


def first_call_ms(case: Case, provider: str, caches: str) -> float:
    """The time of the first forward and backward in a new process, with its kernel caches in `caches`."""
    environment = os.environ | {"TRITON_CACHE_DIR": caches, "TORCHINDUCTOR_CACHE_DIR": caches}
    command = [sys.executable, "-m", "triton_lstm.perf.cold", case.name, provider]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COLD_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no response from a new process within {COLD_LIMIT_S} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    return float(json.loads(done.stdout.splitlines()[-1])["ms"])
