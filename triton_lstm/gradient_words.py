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
GROWN = 2.0  # times all that was asked of the steps it came from
MANY = 0.1  # of a gate's activations
CAUSES = ("output", "hidden", "cell", *GATES, "input")  # the order in which a step computes them


@dataclasses.dataclass(frozen=True)
class Reach:
    """How the norm of dL/d(h, c) goes back through time: the steps t where it is largest, where it has faded (None:
    nowhere) and where the way ends. reached: how many steps it is from the largest to the faded one, or to the end."""

    largest: int
    faded: int | None
    end: int
    reached: int


def backward_order(record: LayerGradients) -> list[int]:
    """The steps t in the order in which back-propagation visits them."""
    steps = list(range(record.steps))
    return steps[::-1] if record.direction == "forward" else steps


def reach(record: LayerGradients, norms: list[float]) -> Reach | None:
    """norms: of dL/d(h, c), by step. None if it is finite or above zero at no step."""
    order = [t for t in backward_order(record) if math.isfinite(norms[t])]
    largest = max(order, key=lambda t: norms[t], default=None)  # of several, the first that is visited
    if largest is None or norms[largest] == 0:
        return None
    after = order[order.index(largest) :]
    faded = next((t for t in after if norms[t] < FADED * norms[largest]), None)
    end = after[-1]
    return Reach(largest, faded, end, after.index(end if faded is None else faded))


def state_norms(statistics: dict[str, StepStatistics]) -> list[float]:
    """The norm of dL/d(h[t], c[t]): what an open forget gate carries is in c alone."""
    return torch.hypot(statistics["hidden"].norm, statistics["cell"].norm).tolist()


def growth(record: LayerGradients, norms: list[float], asked: list[float]) -> tuple[float, int]:
    """The largest that comes back to a step, in units of all that was asked of the steps visited before, and that step.

    If no step made gradients longer, it would be 1 at most: the norm of a sum is not above the sum of the norms. What
    comes back is dL/dh[t] less what is asked of h[t], so |dL/dh[t]| - asked[t] at least.
    """
    found, total = (0.0, -1), 0.0
    for t in backward_order(record):
        if total > 0 and math.isfinite(norms[t]):
            found = max(found, ((norms[t] - asked[t]) / total, t))
        total += asked[t]
    return found


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
    norms, hidden, asked = state_norms(statistics), statistics["hidden"].norm.tolist(), record.asked.tolist()
    found = reach(record, norms)
    if found is None:
        return "gradient: finite at no step" if not all(map(math.isfinite, norms)) else "gradient: none at any step"
    largest = found.largest
    words = f"gradient: |dL/d(h, c)| is largest at step {largest} ({norms[largest]:.3g})"
    grown, where = growth(record, hidden, asked)
    if grown > GROWN:
        words += f"; what comes back to step {where} is"
        words += f" {grown:.3g} times all that was asked of the steps it came from: going back it grows"
    share = norms[found.end] / norms[largest]
    if found.faded is not None:
        words += f"; it falls under {FADED:.0%} of that {_steps(found.reached)} on, at step {found.faded}"
    elif found.reached == 0:
        words += "; there its way ends"
    else:
        words += f"; it reaches step {found.end}, {_steps(found.reached)} on, with {share:.0%} of that"
    return words + _asked(hidden, asked)


def _asked(norms: list[float], asked: list[float]) -> str:
    """Said where several steps are asked for something: how far back each is heard, nobody can tell from the sum."""
    times = [norm / own for norm, own in zip(norms, asked, strict=True) if own > 0 and math.isfinite(norm)]
    if len(times) < 2:
        return ""
    return (
        f"; not all of it came through time: {len(times)} of {_steps(len(norms))} have a gradient of their own, from "
        f"the loss or the layers above, and |dL/dh| is {min(times):.3g} to {max(times):.3g} times that"
    )


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
        found = reach(record, state_norms(statistics))
        writer.add_scalar(f"{tag}/reach", (found.reached if found else 0) / max(record.steps, 1), step)
        for gate, share in _mean_saturation(record).items():
            writer.add_scalar(f"{tag}/saturated/{gate}", share, step)
