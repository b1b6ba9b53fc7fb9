"""Folders of made-up training runs, as `train` leaves them."""

import math
from pathlib import Path

from triton_lstm.training.config import Config, Model, Optimizer, for_file
from triton_lstm.training.logs.metrics import Metrics


def make_run(folder: Path, losses=(3.0, 2.0, 1.0), validation=(), config=None, about=True) -> Path:
    """A run with a loss at every step and a validation loss at the first steps; 1000 tokens and 2 s per step."""
    import yaml

    config = config or Config(optimizer=Optimizer(steps=100))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(for_file(config)))
    if about:
        (folder / "about.yaml").write_text(yaml.safe_dump({"torch": "2.9.1", "gpu": "NVIDIA H100"}))
    (folder / "checkpoints" / "step_00000002").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000002" / "state.json").write_text("{}")
    (folder / "checkpoints" / "step_00000002" / "shard.safetensors").write_bytes(b"x" * 2_500_000)
    with Metrics(folder, config) as metrics:
        for step, loss in enumerate(losses, 1):
            metrics.log(step, tokens=1000 * step, seconds=2.0 * step, loss=loss, tokens_per_s=500.0 + step)
            if step <= len(validation):
                found = validation[step - 1]
                metrics.log(step, validation_loss=found, bits_per_byte=found / math.log(2))
    return folder


def three_runs(folder: Path) -> Path:
    """Three runs, which differ in hidden and lr; the last one has diverged."""
    for name, hidden, lr, losses, validation in [
        ("a", 64, 0.5, (3.0, 2.0, 1.0), (2.5, 1.5)),
        ("b", 128, 0.5, (3.0, 2.5), (2.0, 2.25)),
        ("c", 128, 0.25, (3.0, math.inf, math.nan), ()),
    ]:
        config = Config(model=Model(hidden=hidden), optimizer=Optimizer(lr=lr, steps=100))
        make_run(folder / name, losses, validation, config)
    return folder
