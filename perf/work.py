"""The work of a case, by arithmetic, and its floor: an estimated lower bound of its time, from measured parts.

Counts matmuls (2 operations per multiply-add) and the minimal traffic: each input read once, each output written once.
What an implementation saves for its backward pass or reads twice does not count. The parts are this project's own
exchange and the vendor's copy and matmul; a better exchange could go below the floor.

Resets change neither: a segment's first step counts as a sequence's does, and a byte a row is not counted. They change
the floor: no segment needs the one before it, so all can run side by side.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from triton_lstm.perf.cases import MODES, WORKING, Case


@dataclasses.dataclass(frozen=True)
class Floors:
    """Measurements and facts of the device.

    copy_gbs: GB/s read and written by a device-to-device copy. tflops: of a large matmul, by precision.
    exchange_us: of one exchange of h, by number of programs, the faster of flag and barrier.
    processors: number of SMs; on_chip_bytes: shared memory and registers of an SM.
    """

    copy_gbs: float
    tflops: dict[str, float]
    exchange_us: dict[int, float]
    processors: int
    on_chip_bytes: int


def _layers(case: Case) -> list[tuple[int, int]]:
    """Input width and recurrent width of every layer, equal for both directions."""
    recurrent = case.proj_size or case.H
    return [(case.I if layer == 0 else case.directions * recurrent, recurrent) for layer in range(case.layers)]


def segments_of(case: Case) -> torch.Tensor:
    """The length of every segment: a sequence's, or those of its parts if the state begins anew inside of it."""
    if case.resets is None:
        return case.lengths()
    begins = case.reset_rows() if case.batch_first else case.reset_rows().t().contiguous()
    begins[:, 0] = True
    return begins.flatten().nonzero().squeeze(1).diff(append=torch.tensor([begins.numel()]))


def flops_of_step(case: Case) -> int:
    """Operations of the recurrent matmul per row, step, layer and direction."""
    return 2 * 4 * case.H * (case.proj_size or case.H)


def flops(case: Case, mode: str) -> int:
    """Floating-point operations of all matmuls; the backward pass has two for each in the forward pass."""
    tokens = int(case.lengths().sum())
    project = 2 * case.H * case.proj_size
    forward = sum(
        case.directions * tokens * (2 * 4 * case.H * (inputs + recurrent) + project)
        for inputs, recurrent in _layers(case)
    )
    return forward * (MODES[mode].forward + 2 * MODES[mode].backward)


def weights(case: Case) -> int:
    """The number of elements of all parameters."""
    biases = 2 * 4 * case.H
    return sum(
        case.directions * (4 * case.H * (inputs + recurrent) + biases + case.H * case.proj_size)
        for inputs, recurrent in _layers(case)
    )


def least_bytes(case: Case, mode: str) -> int:
    """Forward reads input and weights and writes the output; backward reads these and the gradient of the output, and
    writes the gradients of input and weights."""
    tokens = int(case.lengths().sum())
    x, y, w = tokens * case.I, tokens * case.directions * (case.proj_size or case.H), weights(case)
    once = case.dtype.itemsize * (x + w + y)
    return once * (MODES[mode].forward + 2 * MODES[mode].backward)


def fewest_programs(case: Case, floors: Floors) -> int:
    """The number of programs that hold a layer's recurrent weights on chip; one per SM if they do not fit."""
    needed = 4 * case.H * (case.proj_size or case.H) * case.dtype.itemsize
    return min(floors.processors, math.ceil(needed / floors.on_chip_bytes))


def step_us(case: Case, floors: Floors) -> float:
    """The shortest step with any number of programs: one exchange and their share of the matmul.

    Between two measured numbers of programs the exchange is assumed to cost as much as with the smaller one, and the
    matmul as with the larger one, for a safe lower bound. A single program exchanges nothing; every segment can have
    programs of its own while there are SMs.
    """
    least = fewest_programs(case, floors)
    segments = segments_of(case)
    rows = int(segments.sum()) / int(segments.max())
    whole = rows * flops_of_step(case) / floors.tflops[case.precision] / 1e6  # us on all processors
    measured = [1, *sorted(floors.exchange_us)]
    times = []
    for programs, following in zip(measured, [*measured[1:], floors.processors + 1], strict=True):
        most = following - 1
        if most >= least:
            share = min(floors.processors, most * len(segments)) / floors.processors
            times.append((0.0 if programs == 1 else floors.exchange_us[programs]) + whole / share)
    return min(times)


def floor_ms(case: Case, mode: str, floors: Floors) -> float:
    """The longest of three: the chain of steps, all matmuls at full rate, all bytes at copy speed.

    A pass has the longest segment's steps + layers - 1, as if layers ran as a wavefront and directions in parallel. NaN
    for a mode whose time does not depend on the work, and if a part was not measured.
    """
    if mode not in WORKING:
        return math.nan
    passes = MODES[mode].forward + MODES[mode].backward
    chain = passes * (int(segments_of(case).max()) + case.layers - 1) * step_us(case, floors) / 1e3
    products = flops(case, mode) / floors.tflops[case.precision] / 1e9
    traffic = least_bytes(case, mode) / floors.copy_gbs / 1e6
    return math.nan if math.isnan(chain + products + traffic) else max(chain, products, traffic)
