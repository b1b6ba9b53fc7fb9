"""Recorded gradients in words, and as numbers for TensorBoard."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from triton_lstm.layer_gradients import LayerGradients
from triton_lstm.record import GATES
from triton_lstm.statistics import StepStatistics

FADED = 0.01  # of the largest norm
GROWN = 2.0  # times the norm where back-propagation began
MANY = 0.1  # of a gate's activations
CAUSES = ("output", "hidden", "cell", *GATES, "input")  # the order in which a step computes them


@dataclasses.dataclass(frozen=True)
class Reach:
    """How the norm of dL/dh goes back through time: the steps t where it is first there, largest, faded (None: nowhere)
    and where the way ends. reached: how many steps it is from the largest to the faded one, or to the end."""

    begin: int | None
    largest: int | None
    faded: int | None
    end: int | None
    reached: int
    norms: list[float]

    @property
    def growth(self) -> float:
        """The largest norm, in units of that at `begin`."""
        if self.begin is None or self.largest is None:
            return 1.0
        return self.norms[self.largest] / self.norms[self.begin]


def backward_order(record: LayerGradients) -> list[int]:
    """The steps t in the order in which back-propagation visits them."""
    steps = list(range(record.steps))
    return steps[::-1] if record.direction == "forward" else steps


def reach(record: LayerGradients, statistics: dict[str, StepStatistics]) -> Reach:
    norms = statistics["hidden"].norm.tolist()
    order = [t for t in backward_order(record) if math.isfinite(norms[t])]
    begin = next((t for t in order if norms[t] > 0), None)
    if begin is None:
        return Reach(None, None, None, None, 0, norms)
    largest = max(order, key=lambda t: norms[t])  # of several, the first that is visited
    after = order[order.index(largest) :]
    faded = next((t for t in after if norms[t] < FADED * norms[largest]), None)
    end = after[-1]
    return Reach(begin, largest, faded, end, after.index(end if faded is None else faded), norms)


def summary(records: list[LayerGradients], modules: list[str]) -> str:
    """See Gradients.summary; modules: all that were listened to."""
    lines = []
    for record in records:
        statistics = {name: StepStatistics(*(t.cpu() for t in s)) for name, s in record.statistics().items()}
        lines.append(f"{record.name}, {_steps(record.steps)}:")
        lines += [f"  {line}" for line in (_reach(record, statistics), _odd(record, statistics), _saturated(record))]
    silent = [repr(name) for name in modules if name not in {record.module for record in records}]
    if silent:
        lines.append(f"nothing was recorded of {', '.join(silent)}: no call inside the block, or no backward pass")
    return "\n".join(lines)


def _reach(record: LayerGradients, statistics: dict[str, StepStatistics]) -> str:
    found = reach(record, statistics)
    if found.begin is None or found.largest is None:
        return "gradient: none at any step" if not any(map(math.isnan, found.norms)) else "gradient: finite at no step"
    largest, norms = found.largest, found.norms
    words = f"gradient: |dL/dh| is largest at step {largest} ({norms[largest]:.3g})"
    if found.growth > GROWN:
        words += f", {found.growth:.3g} times what it is at step {found.begin}: going back it grows"
    if found.faded is not None:
        return words + f"; it falls under {FADED:.0%} of that {_steps(found.reached)} on, at step {found.faded}"
    if found.end is None or found.reached == 0:
        return words + "; there its way ends"
    share = norms[found.end] / norms[largest]
    return words + f"; it reaches step {found.end}, {_steps(found.reached)} on, with {share:.0%} of that"


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _odd(record: LayerGradients, statistics: dict[str, StepStatistics]) -> str:
    for t in backward_order(record):
        for name in CAUSES:
            share = statistics[name].nonfinite[t].item()
            if share > 0:
                what = f"gate {name}" if name in GATES else name
                words = f"NaN or infinity: first at step {t} in {what} ({share:.2g} of its values)"
                return f"{words}; {_origin(record, name, t)}"
    return "NaN or infinity: none"


def _origin(record: LayerGradients, name: str, t: int) -> str:
    if name == "output":
        return "it came from the loss or from the layers above"
    ends = record.lengths.sub(1).tolist() if record.lengths is not None else [record.steps - 1]
    if name in ("hidden", "cell") and t in (ends if record.direction == "forward" else [0]):
        return "it came from the loss of h_n or c_n, or arose here"
    if name == "input" and record.directions == 2:
        return "both directions share the input: it arose here or in the other one"
    return "it arose here"


def _saturated(record: LayerGradients) -> str:
    shares = _mean_saturation(record)
    words = [f"{gate} {share:.0%}" for gate, share in shares.items() if share >= MANY]
    return f"saturated gates: {', '.join(words) or 'hardly any'}"


def _mean_saturation(record: LayerGradients) -> dict[str, float]:
    return dict(zip(GATES, record.saturated.double().nan_to_num().mean(0).tolist(), strict=True))


def log(records: list[LayerGradients], writer: Any, step: int | None) -> None:
    """See Gradients.log."""
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(f"log wants a SummaryWriter, or what has its add_scalar, got {type(writer).__name__}")
    several = {name for name in ("call", "backward") if len({getattr(r, name) for r in records}) > 1}
    for record in records:
        statistics = record.statistics()
        where = "/".join(f"{name}{getattr(record, name)}" for name in ("call", "backward") if name in several)
        tag = f"gradients/{record.module}/{where}{'/' * bool(where)}layer{record.layer}_{record.direction}"
        for quantity, numbers in statistics.items():
            writer.add_scalar(f"{tag}/norm/{quantity}", numbers.norm.square().sum().sqrt().item(), step)
        odd = torch.stack([numbers.nonfinite.mean() for numbers in statistics.values()]).mean()
        writer.add_scalar(f"{tag}/nonfinite", odd.item(), step)
        writer.add_scalar(f"{tag}/reach", reach(record, statistics).reached / max(record.steps, 1), step)
        for gate, share in _mean_saturation(record).items():
            writer.add_scalar(f"{tag}/saturated/{gate}", share, step)
