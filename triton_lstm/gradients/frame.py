"""Recorded gradients as a pandas DataFrame."""

from __future__ import annotations

from typing import Any

import torch

from triton_lstm.gradients.layer import LayerGradients
from triton_lstm.gradients.statistics import GATES, StepStatistics


def frame(records: list[LayerGradients]) -> Any:
    """See Gradients.frame."""
    try:
        import pandas as pd
    except ImportError:
        raise ImportError('frame() needs pandas: pip install ".[perf]" in the checkout') from None
    return pd.concat([_record_frame(pd, record) for record in records], ignore_index=True)


def _record_frame(pd: Any, record: LayerGradients) -> Any:
    parts = []
    saturated = record.saturated.double().cpu()
    for quantity, statistics in record.statistics().items():
        steps = range(-1, 0) if quantity in ("h0", "c0") else range(record.steps)
        numbers = torch.stack(statistics).cpu().numpy()
        columns = dict(step=steps, quantity=quantity, **dict(zip(StepStatistics._fields, numbers, strict=True)))
        columns["begun"] = 0.0 if record.begun is None or quantity in ("h0", "c0") else record.begun.cpu().numpy()
        columns["saturated"] = saturated[:, GATES.index(quantity)].numpy() if quantity in GATES else float("nan")
        parts.append(pd.DataFrame(columns))
    result = pd.concat(parts, ignore_index=True)
    for position, column in enumerate(("module", "call", "backward", "layer", "direction")):
        result.insert(position, column, getattr(record, column))
    return result
