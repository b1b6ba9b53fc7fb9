"""One provider on one case: how each mode is timed, and the memory that a call takes."""

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

TURNS = 3  # of every provider and mode, one provider after the other
COLD_LIMIT_S = 120
Turn = Callable[[], list[float]]


class NotHereError(Exception):
    """A mode that this device does not have; the text says why."""


class Runner:
    """A provider's module on a case's data; no mode leaves anything behind that another would see."""

    def __init__(self, problem: Problem, module: nn.Module, provider: str) -> None:
        self.case, self.module, self.provider = problem.case, module, provider
        self.x, self.x_leaf = leaf(problem.inputs[0], problem.case.dtype)
        self.dy = problem.cotangents[0]
        self.leaves = [self.x_leaf, *module.parameters()]
        self.on_gpu = self.x_leaf.device.type == "cuda"
        self.caches: tempfile.TemporaryDirectory[str] | None = None  # filled by a cold start

    def turn(self, name: str) -> Turn:
        """A function that measures one turn of a mode and returns the times of its calls in ms.

        Raises NotHereError where this device does not have the mode.
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
        """A function that does what the mode is about, once; its forward too if the mode is backward alone."""
        mode = MODES[name]
        return self.inference if not mode.grad else self.both if mode.backward else self.forward

    def forward(self) -> torch.Tensor:
        """The output, with its graph."""
        return data(self.module(self.x)[0])

    def inference(self) -> None:
        """A call without one."""
        with torch.no_grad():
            self.module(self.x)

    def backward(self, y: torch.Tensor) -> None:
        """Fresh gradients of the input and of all parameters."""
        for tensor in self.leaves:
            tensor.grad = None
        y.backward(self.dy)

    def both(self) -> None:
        """Forward and backward."""
        self.backward(self.forward())

    def captured_step(self) -> Any:
        """A whole training step as a graph, checked; the learning rate is 0, so that the weights stay.

        Raises NotHereError off a GPU, RuntimeError if a replay gives another gradient than a plain call.
        """
        if not self.on_gpu:
            raise NotHereError("CUDA graphs need a GPU")
        optimizer = torch.optim.SGD(self.module.parameters(), lr=0.0, foreach=True)

        def train() -> None:
            self.both()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # as torch.cuda.graph's documentation asks
                train()
        torch.cuda.current_stream().wait_stream(side)
        expected = self.gradient().clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            train()
        self.gradient().zero_()
        graph.replay()
        if not torch.allclose(self.gradient(), expected, rtol=1e-2, atol=1e-2):
            raise RuntimeError("the graph's replay gives another gradient than a plain call")
        return graph

    def gradient(self) -> torch.Tensor:
        """The input's, of the last backward."""
        assert self.x_leaf.grad is not None
        return self.x_leaf.grad

    def peak_mb(self, name: str) -> float:
        """Most memory of a call above what was there before it, in 2**20 bytes, by torch's counters.

        NaN on a CPU, and for modes that are not about the device.
        """
        if MODES[name].timer != "device" or not self.on_gpu:
            return math.nan
        call = self.call(name)
        self.module.train(MODES[name].grad)
        call()  # what is compiled or cached at the first call is not the call's own
        for tensor in self.leaves:
            tensor.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def cold_start_ms(self) -> list[float]:
        """The first forward and backward of a fresh process with empty caches, which it fills."""
        self.caches = tempfile.TemporaryDirectory()
        return [first_call_ms(self.case, self.provider, self.caches.name)]

    def cached_start_ms(self) -> list[float]:
        """Likewise, with the caches that a cold start filled."""
        if self.caches is None:
            self.cold_start_ms()
        assert self.caches is not None
        return [first_call_ms(self.case, self.provider, self.caches.name)]


def first_call_ms(case: Case, provider: str, caches: str) -> float:
    """The time that a process of its own takes for its first forward and backward, its kernel caches in `caches`."""
    environment = os.environ | {"TRITON_CACHE_DIR": caches, "TORCHINDUCTOR_CACHE_DIR": caches}
    command = [sys.executable, "-m", "triton_lstm.perf.cold", case.name, provider]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COLD_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer of a fresh process within {COLD_LIMIT_S} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    return float(json.loads(done.stdout.splitlines()[-1])["ms"])
