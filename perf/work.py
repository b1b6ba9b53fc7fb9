"""The work of a case, by arithmetic, and its floor: an estimate, from measured parts, of the least time for it here.

Counted are products (2 operations per multiply-add) and the bytes that must move at least: each input read once, each
output written once. What an implementation saves for its backward pass, or reads twice, is its own choice. The parts
are this project's own exchange and the vendor's copy and product; a better exchange would be below the floor.
"""

from __future__ import annotations

import dataclasses
import math

from triton_lstm.perf.cases import MODES, WORKING, Case


@dataclasses.dataclass(frozen=True)
class Floors:
    """What was measured of the device, and what it is.

    copy_gbs: GB/s read and written by a device-to-device copy. tflops: of a large product, by precision.
    exchange_us: of one exchange of h between so many programs, the faster of flag and barrier.
    processors: of the device; on_chip_bytes: shared memory and registers of one of them.
    """

    copy_gbs: float
    tflops: dict[str, float]
    exchange_us: dict[int, float]
    processors: int
    on_chip_bytes: int


def _layers(case: Case) -> list[tuple[int, int]]:
    """Input width and recurrent width of every layer; the same for both directions."""
    recurrent = case.proj_size or case.H
    return [(case.I if layer == 0 else case.directions * recurrent, recurrent) for layer in range(case.layers)]


def flops_of_step(case: Case) -> int:
    """Operations of the recurrent product of one row, step, layer and direction."""
    return 2 * 4 * case.H * (case.proj_size or case.H)


def flops(case: Case, mode: str) -> int:
    """Floating-point operations of all products; backward has two for each of forward's."""
    tokens = int(case.lengths().sum())
    project = 2 * case.H * case.proj_size
    forward = sum(
        case.directions * tokens * (2 * 4 * case.H * (inputs + recurrent) + project)
        for inputs, recurrent in _layers(case)
    )
    return forward * (MODES[mode].forward + 2 * MODES[mode].backward)


def weights(case: Case) -> int:
    """How many numbers the parameters are."""
    biases = 2 * 4 * case.H
    return sum(
        case.directions * (4 * case.H * (inputs + recurrent) + biases + case.H * case.proj_size)
        for inputs, recurrent in _layers(case)
    )


def least_bytes(case: Case, mode: str) -> int:
    """Forward reads input and weights and writes the output; backward reads those and the output's gradient, and writes
    the input's and the weights' gradients."""
    tokens = int(case.lengths().sum())
    x, y, w = tokens * case.I, tokens * case.directions * (case.proj_size or case.H), weights(case)
    once = case.dtype.itemsize * (x + w + y)
    return once * (MODES[mode].forward + 2 * MODES[mode].backward)


def fewest_programs(case: Case, floors: Floors) -> int:
    """How many programs hold a layer's recurrent weights on chip; all processors where they do not fit."""
    needed = 4 * case.H * (case.proj_size or case.H) * case.dtype.itemsize
    return min(floors.processors, math.ceil(needed / floors.on_chip_bytes))


def step_us(case: Case, floors: Floors) -> float:
    """The best that any number of programs could do for a step: one exchange and their share of the product.

    Between two measured numbers of programs an exchange is taken to cost what the smaller one costs, and the product to
    be shared as the larger one shares it, so that nobody can be below. One program exchanges nothing; every row can
    have programs of its own while there are processors.
    """
    least = fewest_programs(case, floors)
    rows = int(case.lengths().sum()) / case.T
    whole = rows * flops_of_step(case) / floors.tflops[case.precision] / 1e6  # us on all processors
    measured = [1, *sorted(floors.exchange_us)]
    times = []
    for programs, following in zip(measured, [*measured[1:], floors.processors + 1], strict=True):
        most = following - 1
        if most >= least:
            share = min(floors.processors, most * case.B) / floors.processors
            times.append((0.0 if programs == 1 else floors.exchange_us[programs]) + whole / share)
    return min(times)


def floor_ms(case: Case, mode: str, floors: Floors) -> float:
    """The longest of three: the chain of steps, all products at full rate, all bytes at copy speed.

    A pass has T + layers - 1 steps, as if layers ran as a wavefront and directions side by side. NaN for a mode whose
    time work does not explain, and where a part was not measured.
    """
    if mode not in WORKING:
        return math.nan
    passes = MODES[mode].forward + MODES[mode].backward
    chain = passes * (case.T + case.layers - 1) * step_us(case, floors) / 1e3
    products = flops(case, mode) / floors.tflops[case.precision] / 1e9
    traffic = least_bytes(case, mode) / floors.copy_gbs / 1e6
    return math.nan if math.isnan(chain + products + traffic) else max(chain, products, traffic)
