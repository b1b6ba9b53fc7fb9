"""One provider on one case: what a turn of each mode is, and what memory it takes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from triton_lstm.perf.cases import Case
from triton_lstm.perf.check import Problem, data, leaf
from triton_lstm.perf.clock import host_times_ms, times_after_ms, times_ms

TURNS = 3  # of every provider and mode, one provider after the other
COLD_LIMIT_S = 120
Turn = Callable[[], list[float]]


class NotHereError(Exception):
    """A mode that this device does not have; the text says why."""


class Runner:
    """A provider's module on a case's data. `turn(mode)` makes what yields a turn's times; no mode changes another."""

    def __init__(self, problem: Problem, module: nn.Module, provider: str) -> None:
        self.case, self.module, self.provider = problem.case, module, provider
        self.x, self.wanted = leaf(problem.inputs[0], problem.case.dtype)
        self.dy = problem.cotangents[0]
        self.leaves = [self.wanted, *module.parameters()]

    def turn(self, mode: str) -> Turn:
        if mode in ("cold", "cold_cached"):
            return functools.partial(cold_times_ms, self.case, self.provider, cached=mode == "cold_cached")
        self.module.train(mode not in ("inference", "host_inference"))
        if mode == "backward":
            return lambda: times_after_ms(self.forward, self.backward)
        if mode == "graph_step":
            return functools.partial(times_ms, self.captured_step().replay)
        call = self.inference if mode in ("inference", "host_inference") else self.both
        if mode.startswith("host"):
            return lambda: host_times_ms(call)
        return functools.partial(times_ms, self.forward if mode == "forward" else call, clear=self.leaves)

    def forward(self) -> torch.Tensor:
        return data(self.module(self.x)[0])

    def inference(self) -> None:
        with torch.no_grad():
            self.module(self.x)

    def backward(self, y: torch.Tensor) -> None:
        for tensor in self.leaves:
            tensor.grad = None
        y.backward(self.dy)

    def both(self) -> None:
        self.backward(self.forward())

    def captured_step(self) -> Any:
        """A whole training step as a graph; the weights move by nothing, so that no other mode sees it."""
        if self.wanted.device.type != "cuda":
            raise NotHereError("CUDA graphs need a GPU")
        step = torch.optim.SGD(self.module.parameters(), lr=0.0, foreach=True)

        def train() -> None:
            self.both()
            step.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # as torch.cuda.graph's documentation asks
                train()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            train()
        return graph

    def peak_mb(self, mode: str) -> float:
        """Most memory of a call above what was there before it, in 2**20 bytes, by torch's counters; NaN on a CPU."""
        calls = {
            "inference": self.inference,
            "forward": self.forward,
            "backward": lambda: self.backward(self.forward()),
            "forward_backward": self.both,
        }
        if mode not in calls or self.wanted.device.type != "cuda":
            return float("nan")
        for tensor in self.leaves:
            tensor.grad = None
        self.module.train(mode != "inference")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        calls[mode]()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def cold_times_ms(case: Case, provider: str, *, cached: bool) -> list[float]:
    """The first forward and backward of a fresh process, once; `cached`: after another one filled the same caches."""
    with tempfile.TemporaryDirectory() as caches:
        environment = os.environ | {"TRITON_CACHE_DIR": caches, "TORCHINDUCTOR_CACHE_DIR": caches}
        for _ in range(2 if cached else 1):
            command = [sys.executable, "-m", "triton_lstm.perf.cold", case.name, provider]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COLD_LIMIT_S)
            if done.returncode:
                raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
        return [float(json.loads(done.stdout.splitlines()[-1])["ms"])]
