"""The benchmark cases, and named suites of them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal

import torch

from triton_lstm.settings import DTYPES

Precision = Literal["fp16", "bf16", "tf32", "fp32", "fp64"]
LENGTH_SPREAD, LENGTH_CUT = 0.5, 1.645  # sigma of log(length), and the distance of T from the median in sigmas


@dataclasses.dataclass(frozen=True)
class Mode:
    """What is timed: the number of forward and backward passes, and how: on the device's clock, as the replay of a CUDA
    graph, on the host's clock until the call returns, or in a new process. grad: in train mode, under autograd.
    """

    about: str
    forward: int
    backward: int
    timer: Literal["device", "graph", "host", "cold"] = "device"
    grad: bool = True


MODES = {
    "inference": Mode("forward under no_grad, in eval mode", 1, 0, grad=False),
    "forward": Mode("forward in train mode, with what backward needs saved", 1, 0),
    "backward": Mode("backward alone, after a forward that is not timed", 0, 1),
    "forward_backward": Mode("forward and backward", 1, 1),
    "graph_step": Mode("a training step (forward, backward, SGD) as the replay of a CUDA graph", 1, 1, "graph"),
    "host_inference": Mode(
        "time until a call of inference returns to Python, the device idle before", 1, 0, "host", False
    ),
    "host_training": Mode("time until forward and backward return to Python, the device idle before", 1, 1, "host"),
    "cold": Mode("the first forward and backward of a fresh process, with empty kernel caches", 1, 1, "cold"),
    "cold_cached": Mode("the first forward and backward of a fresh process, with filled kernel caches", 1, 1, "cold"),
}
WORKING = tuple(
    name for name, mode in MODES.items() if mode.timer in ("device", "graph")
)  # modes whose time depends on the work
USUAL = ("inference", "forward", "backward", "forward_backward")
HOST = ("host_inference", "host_training")
EVERY = tuple(MODES)


@dataclasses.dataclass(frozen=True)
class Case:
    """An LSTM, its input and the modes to measure.

    precision: the dtype, and for float32 whether TF32 is allowed ("tf32") or not ("fp32").
    T, B, I, H: steps, rows, input size (H if 0), hidden units.
    layers, bidirectional, proj_size, batch_first: nn.LSTM's.
    packed: a PackedSequence of log-normal lengths clamped to T, as about one in twenty is; about half is padding.
    resets: the fraction of the T*B rows at which the state begins anew, after the first step; 0: resets are given, none
        is set; None: none are given.
    modes: keys of MODES. why: the reason for the case.

    Raises ValueError for resets that are no fraction, or of packed rows.
    """

    precision: Precision
    T: int
    B: int
    H: int
    I: int = 0  # noqa: E741 - the field's name for it
    layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    batch_first: bool = False
    packed: bool = False
    resets: float | None = None
    modes: tuple[str, ...] = USUAL
    why: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "I", self.I or self.H)
        if self.resets is not None and not 0 <= self.resets <= 1:
            raise ValueError(f"resets must be None or a fraction of the rows, from 0 to 1, got {self.resets}")
        if self.resets is not None and self.packed:
            raise ValueError("resets of packed rows are no benchmark: a case has resets or is packed")

    @property
    def name(self) -> str:
        parts = [self.precision, f"T{self.T}", f"B{self.B}", f"I{self.I}", f"H{self.H}"]
        parts += [f"L{self.layers}"] * (self.layers > 1) + ["bi"] * self.bidirectional
        parts += [f"P{self.proj_size}"] * (self.proj_size > 0) + ["bfirst"] * self.batch_first
        parts += ["packed"] * self.packed
        return "-".join(parts if self.resets is None else [*parts, f"resets{100 * self.resets:g}%"])

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def module_arguments(self) -> dict[str, Any]:
        """The arguments of nn.LSTM."""
        return dict(
            input_size=self.I,
            hidden_size=self.H,
            num_layers=self.layers,
            bidirectional=self.bidirectional,
            proj_size=self.proj_size,
            batch_first=self.batch_first,
        )

    def lengths(self) -> torch.Tensor:
        """The length of every sequence (B,), longest first; deterministic."""
        if not self.packed:
            return torch.full((self.B,), self.T)
        generator = torch.Generator().manual_seed(0)
        sigmas = torch.randn(self.B, generator=generator) - LENGTH_CUT
        sigmas[0] = 0  # at least one is T long
        lengths = torch.exp(LENGTH_SPREAD * sigmas.clamp(max=0)) * self.T
        return lengths.round().long().clamp(min=1).sort(descending=True).values

    def reset_rows(self) -> torch.Tensor:
        """bool, (T, B), or (B, T) with batch_first: where the state begins anew; deterministic.

        Those of a smaller fraction are among those of a larger one.
        """
        later = (self.T - 1) * self.B
        rows = torch.zeros(self.T, self.B, dtype=torch.bool)
        chosen = torch.randperm(later, generator=torch.Generator().manual_seed(0))
        rows[1:].view(-1)[chosen[: round((self.resets or 0) * self.T * self.B)]] = True
        return rows.t().contiguous() if self.batch_first else rows


def _smoke() -> list[Case]:
    return [
        Case("fp32", T=3, B=2, H=8, modes=EVERY, why="the smallest; every mode"),
        Case("bf16", T=3, B=3, H=16, I=5, layers=2, bidirectional=True, batch_first=True, why="most of the options"),
        Case("fp32", T=4, B=3, H=8, proj_size=3, modes=("inference",), why="a projection"),
        Case("fp32", T=4, B=3, H=8, packed=True, modes=("inference",), why="packed rows"),
        Case("fp32", T=6, B=3, H=8, resets=0.2, modes=("inference", "forward_backward"), why="states that begin anew"),
    ]


def _quick() -> list[Case]:
    return [
        Case("fp16", T=1024, B=16, H=768, modes=USUAL + HOST, why="the published figure of cuDNN's persistent kernel"),
        Case("bf16", T=128, B=64, H=128, why="one program; cuDNN's small-H kernel, forward and backward"),
        Case("bf16", T=128, B=64, H=512, why="several programs; cuDNN's standard algorithm"),
        Case("bf16", T=128, B=64, H=1024, why="training a language model"),
        Case("tf32", T=128, B=64, H=512, why="the default of float32 users"),
        Case("bf16", T=128, B=16, H=2048, why="weights that do not fit on chip"),
    ]


def _standard() -> list[Case]:
    """Both sides of every limit of cuDNN's fast paths (perf/cudnn.py)."""
    cases = [
        Case("fp16", T=1024, B=16, H=64, why="cuDNN small-H, both passes"),
        Case("fp16", T=1024, B=16, H=128, why="the last H of small-H backward"),
        Case("fp16", T=1024, B=16, H=192, why="the last H of small-H forward; standard backward"),
        Case("fp16", T=1024, B=16, H=256, why="the first H of the persistent kernel"),
        Case("fp16", T=1024, B=16, H=512, modes=EVERY, why="the middle of the persistent kernel's box"),
        Case("fp16", T=1024, B=16, H=650, why="H % 128 != 0: standard; a classic language model's size"),
        Case("fp16", T=1024, B=16, H=768, modes=USUAL + HOST, why="the published figure of the persistent kernel"),
        Case("fp16", T=1024, B=16, H=1024, why="the last H of the persistent kernel"),
        Case("fp16", T=1024, B=16, H=1500, why="beyond the persistent kernel; a classic language model's large size"),
        Case("fp16", T=128, B=16, H=2048, why="weights that do not fit on chip"),
        Case("fp16", T=1024, B=1, H=512, why="one row: B % 8 != 0, standard"),
        Case("fp16", T=1024, B=8, H=512, why="the smallest B of the persistent kernel"),
        Case("fp16", T=1024, B=64, H=512, why="more batch tiles than one"),
        Case("fp16", T=1024, B=128, H=512, why="the last B of the persistent kernel"),
        Case("fp16", T=1024, B=256, H=512, why="B > 128: standard"),
        Case("fp16", T=128, B=16, H=768, why="a short sequence in the box"),
        Case("fp16", T=128, B=64, H=512, I=100, why="I % 128 != 0: standard"),
        Case("fp16", T=128, B=16, H=512, layers=2, why="two layers: standard"),
        Case("fp16", T=128, B=16, H=512, bidirectional=True, why="two directions: standard"),
        Case("fp16", T=128, B=16, H=128, layers=2, bidirectional=True, why="small-H takes layers and directions"),
        Case("fp16", T=128, B=64, H=512, proj_size=128, why="projection: standard"),
        Case("bf16", T=1024, B=64, H=128, why="bf16 has small-H"),
        Case("bf16", T=1024, B=64, H=256, why="bf16 has no persistent kernel"),
        Case(
            "bf16", T=1024, B=64, H=512, modes=(*USUAL, "graph_step", *HOST), why="a usual size in today's usual dtype"
        ),
        Case("bf16", T=1024, B=64, H=1024, modes=(*USUAL, "graph_step"), why="training a language model"),
        Case("bf16", T=128, B=64, H=64, why="the smallest H"),
        Case("bf16", T=128, B=64, H=192, why="small-H forward only"),
        Case("bf16", T=128, B=64, H=650, why="rows of 1300 bytes: no 16-byte loads"),
        Case("bf16", T=128, B=64, H=768, why="between the powers of two"),
        Case("bf16", T=128, B=64, H=1500, why="the largest that stays on chip"),
        Case("bf16", T=128, B=64, H=2048, why="weights that do not fit on chip"),
        Case("bf16", T=128, B=1, H=1024, why="one row: speech and control, one at a time"),
        Case("bf16", T=128, B=8, H=1024, why="half a batch tile"),
        Case("bf16", T=128, B=16, H=1024, why="one batch tile"),
        Case("bf16", T=128, B=128, H=1024, why="many batch tiles"),
        Case("bf16", T=128, B=256, H=1024, why="throughput, not latency"),
        Case("bf16", T=128, B=64, H=512, layers=2, why="two layers"),
        Case("bf16", T=128, B=64, H=512, layers=4, why="four layers"),
        Case("bf16", T=128, B=64, H=512, bidirectional=True, why="two directions"),
        Case("bf16", T=128, B=64, H=512, batch_first=True, why="cuDNN copies a batch_first input"),
        Case("bf16", T=128, B=64, H=512, packed=True, why="rows of spread lengths, as tagging and speech have"),
        Case("fp16", T=128, B=16, H=256, packed=True, why="packed leaves the box"),
        Case("bf16", T=128, B=64, H=512, resets=0.0, why="what resets cost where none is set"),
        Case("bf16", T=128, B=64, H=512, resets=0.001, why="long episodes: most sequences are not split"),
        Case("bf16", T=128, B=64, H=512, resets=0.01, why="about one reset in a sequence: packed documents"),
        Case("bf16", T=128, B=64, H=512, resets=0.1, why="short episodes: split, they make a shorter chain of steps"),
        Case("fp16", T=1024, B=16, H=768, resets=0.01, why="cuDNN's persistent kernel takes no split rows"),
        Case("tf32", T=128, B=64, H=512, resets=0.01, why="in a precision that TorchRL has"),
        Case("bf16", T=128, B=64, H=1024, proj_size=256, why="speech's projected LSTM"),
        Case("bf16", T=32, B=64, H=512, why="short enough for an unrolled loop to compile"),
        Case("tf32", T=128, B=64, H=128, why="the default of float32 users, small-H"),
        Case("tf32", T=128, B=64, H=256, why="tf32, standard"),
        Case("tf32", T=128, B=64, H=512, modes=(*USUAL, "graph_step"), why="tf32, a usual size"),
        Case("tf32", T=128, B=64, H=1024, why="float32 weights that barely fit on chip"),
        Case("tf32", T=1024, B=16, H=768, why="beside the published fp16 figure"),
        Case("fp32", T=128, B=64, H=128, why="float32 at full precision, small-H"),
        Case("fp32", T=128, B=64, H=512, why="float32 at full precision"),
        Case("fp32", T=128, B=64, H=1024, why="float32 at full precision, large"),
    ]
    return cases


def _full() -> list[Case]:
    """The standard cases and a full grid of H, B and T in every precision."""
    precisions: tuple[Precision, ...] = ("fp16", "bf16", "tf32", "fp32")
    plane = itertools.product(
        precisions,
        (128, 1024),
        (64, 128, 192, 256, 512, 650, 768, 1024, 1500, 2048),
        (1, 8, 16, 64, 128, 256),
    )
    cases = _standard()
    known = {case.name for case in cases}
    every = [Case(p, T=T, B=B, H=H, why="the whole plane") for p, T, H, B in plane]
    return cases + [case for case in every if case.name not in known]


SUITES = {"smoke": _smoke, "quick": _quick, "standard": _standard, "full": _full}
