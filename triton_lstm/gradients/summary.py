"""A text summary of recorded gradients, and scalars for TensorBoard."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from triton_lstm.gradients.layer import LayerGradients
from triton_lstm.gradients.statistics import GATES, StepStatistics

FADED = 0.01  # of the largest norm
GROWN = 2.0  # times the total that entered at the steps it came from
MANY = 0.1  # of a gate's activations
CAUSES = ("output", "hidden", "cell", *GATES, "input")  # in the order in which a step computes them


@dataclasses.dataclass(frozen=True)
class Reach:
    """How far the norm of dL/d(h, c) reaches back through time: the steps t where it is largest, where it has faded
    (None: nowhere) and where backpropagation ends. reached: the number of steps from the largest to the faded one, or
    to the end."""

    largest: int
    faded: int | None
    end: int
    reached: int


def backward_order(record: LayerGradients) -> list[int]:
    """The steps t in the order in which backpropagation visits them."""
    steps = list(range(record.steps))
    return steps[::-1] if record.direction == "forward" else steps


def after_a_cut(record: LayerGradients) -> set[int]:
    """The steps that no gradient reaches from those visited before: segments begin in between, in all sequences."""
    if record.begun is None:
        return set()
    cut = [t for t, share in enumerate(record.begun.tolist()) if share == 1 and t > 0]
    return {t - 1 for t in cut} if record.direction == "forward" else set(cut)


def reach(record: LayerGradients, norms: list[float]) -> Reach | None:
    """norms: of dL/d(h, c), by step. None if no step has one that is finite and above zero."""
    order = [t for t in backward_order(record) if math.isfinite(norms[t])]
    largest = max(order, key=lambda t: norms[t], default=None)  # the first visited, if there are several
    if largest is None or norms[largest] == 0:
        return None
    after = order[order.index(largest) :]
    cuts = after_a_cut(record)
    after = after[: next((k for k, t in enumerate(after) if k and t in cuts), None)]
    faded = next((t for t in after if norms[t] < FADED * norms[largest]), None)
    end = after[-1]
    return Reach(largest, faded, end, after.index(end if faded is None else faded))


def state_norms(statistics: dict[str, StepStatistics]) -> list[float]:
    """The norm of dL/d(h[t], c[t]): an open forget gate carries gradient in c alone."""
    return torch.hypot(statistics["hidden"].norm, statistics["cell"].norm).tolist()


def growth(record: LayerGradients, norms: list[float], asked: list[float]) -> tuple[float, int]:
    """The largest ratio of the gradient that flows back to a step to the total that entered at the steps visited
    before, and that step.

    If no step amplified gradients, the ratio would be at most 1, by the triangle inequality. What flows back is
    dL/dh[t] minus what enters at h[t], so at least |dL/dh[t]| - asked[t].
    """
    found, total = (0.0, -1), 0.0
    cuts = after_a_cut(record)
    for t in backward_order(record):
        total = 0.0 if t in cuts else total
        if total > 0 and math.isfinite(norms[t]):
            found = max(found, ((norms[t] - asked[t]) / total, t))
        total += asked[t]
    return found


def summary(records: list[LayerGradients], modules: list[str]) -> str:
    """See Gradients.summary; modules: all those recorded."""
    lines = []
    for record in records:
        statistics = {name: StepStatistics(*(t.cpu() for t in s)) for name, s in record.statistics().items()}
        lines.append(f"{record.name}, {_steps(record.steps)}:")
        lines += [f"  {line}" for line in (_reach(record, statistics), _odd(record, statistics), _saturated(record))]
        if record.begun is not None:
            lines.append(f"  {_segments(record.begun)}")
    missing = [repr(name) for name in modules if name not in {record.module for record in records}]
    if missing:
        lines.append(f"nothing was recorded for {', '.join(missing)}: no call inside the block, or no backward pass")
    return "\n".join(lines)


def _reach(record: LayerGradients, statistics: dict[str, StepStatistics]) -> str:
    norms, hidden, asked = state_norms(statistics), statistics["hidden"].norm.tolist(), record.asked.tolist()
    found = reach(record, norms)
    if found is None:
        return "gradient: not finite at any step" if not all(map(math.isfinite, norms)) else "gradient: zero everywhere"
    largest = found.largest
    text = f"gradient: |dL/d(h, c)| is largest at step {largest} ({norms[largest]:.3g})"
    grown, where = growth(record, hidden, asked)
    if grown > GROWN:
        text += f"; the gradient flowing back to step {where} is"
        text += f" {grown:.3g} times the total that entered at the steps it came from: it grows going back"
    share = norms[found.end] / norms[largest]
    if found.faded is not None:
        text += f"; it drops below {FADED:.0%} of that after {_steps(found.reached)}, at step {found.faded}"
    elif found.reached == 0:
        text += "; backpropagation ends there"
    else:
        text += f"; it reaches step {found.end} after {_steps(found.reached)}, at {share:.0%} of that"
    return text + _asked(hidden, asked)


def _asked(norms: list[float], asked: list[float]) -> str:
    """A note if gradients enter at several steps: how far back each of them reaches is not visible in the sum."""
    times = [norm / own for norm, own in zip(norms, asked, strict=True) if own > 0 and math.isfinite(norm)]
    if len(times) < 2:
        return ""
    return (
        f"; not all of it flowed through time: at {len(times)} of {_steps(len(norms))} a gradient enters directly, "
        f"from the loss or the layers above, and |dL/dh| is {min(times):.3g} to {max(times):.3g} times that"
    )


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _odd(record: LayerGradients, statistics: dict[str, StepStatistics]) -> str:
    for t in backward_order(record):
        for name in CAUSES:
            share = statistics[name].nonfinite[t].item()
            if share > 0:
                what = f"gate {name}" if name in GATES else name
                where = f"first at step {t} in {what} ({share:.2g} of its values)"
                return f"NaN or infinity: {where}; {_origin(record, name, t)}"
    return "NaN or infinity: none"


def _origin(record: LayerGradients, name: str, t: int) -> str:
    if name == "output":
        return "it came from the loss or from the layers above"
    ends = record.lengths.sub(1).tolist() if record.lengths is not None else [record.steps - 1]
    if name in ("hidden", "cell") and t in (ends if record.direction == "forward" else [0]):
        return "it came from the gradient of h_n or c_n, or originated here"
    if name == "input" and record.directions == 2:
        return "both directions share the input: it originated here or in the other direction"
    return "it originated here"


def _segments(begun: torch.Tensor) -> str:
    """begun: LayerGradients.begun."""
    later = begun[1:]
    somewhere, everywhere = int((later > 0).sum()), int((later == 1).sum())
    return (
        f"segments: some begin at {somewhere} of the {_steps(len(later))} after the first, in all sequences at "
        f"{everywhere}; no gradient crosses from one to another"
    )


def _saturated(record: LayerGradients) -> str:
    shares = _mean_saturation(record)
    shown = [f"{gate} {share:.0%}" for gate, share in shares.items() if share >= MANY]
    return f"saturated gates: {', '.join(shown) or 'hardly any'}"


def _mean_saturation(record: LayerGradients) -> dict[str, float]:
    return dict(zip(GATES, record.saturated.double().nan_to_num().mean(0).tolist(), strict=True))


def log(records: list[LayerGradients], writer: Any, step: int | None) -> None:
    """See Gradients.log."""
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(f"log expects a SummaryWriter or an object with add_scalar, got {type(writer).__name__}")
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
