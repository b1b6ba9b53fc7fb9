"""TensorBoard and Weights & Biases, which a run logs to besides metrics.csv."""

from __future__ import annotations

import dataclasses
import html
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from triton_lstm.gradients.results import Gradients
from triton_lstm.settings import UsageError, require
from triton_lstm.system.atomic_file import atomic_write
from triton_lstm.training.config import Config

INIT_S, FINISH_S = 60.0, 300.0  # how long W&B may take to begin a run, and to upload the rest at its end


class Tracker(Protocol):
    """Where a run is followed. Any method may raise anything: it is the caller who goes on without the tracker."""

    name: str

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def log_text(self, step: int, text: str) -> None: ...

    def log_gradients(self, step: int, grads: Gradients) -> None: ...

    def close(self, exit_code: int) -> None: ...


def require_trackers(config: Config) -> None:
    """Raises UsageError unless what `config.output` logs to can be imported."""
    if config.output.tensorboard:
        require("tensorboard", extra="train")
    if config.output.wandb:
        require("wandb", extra="wandb")
    if config.output.gradients_every:
        if not (config.output.tensorboard or config.output.wandb):
            raise UsageError("--gradients-every has nowhere to go. Add --tensorboard or --wandb PROJECT")
        require("matplotlib")


def open_trackers(folder: Path, config: Config, resumed_from: int) -> Iterator[Tracker]:
    """Yields the trackers that `config.output` asks for.

    Raises:
        UsageError: if Weights & Biases does not begin the run.
        OSError: if a file cannot be written.
    """
    if config.output.tensorboard:
        yield TensorBoard(folder / "tensorboard", resumed_from)
    if config.output.wandb:
        yield WeightsAndBiases(folder, config, config.output.wandb)


class TensorBoard:
    """Event files in `folder`; what an earlier process logged after step `resumed_from` is hidden."""

    name = "TensorBoard"

    def __init__(self, folder: Path, resumed_from: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._hook = threading.excepthook
        before = set(threading.enumerate())
        self._writer: Any = SummaryWriter(str(folder), purge_step=resumed_from + 1)
        self._threads = set(threading.enumerate()) - before
        threading.excepthook = self._without_traceback

    def _without_traceback(self, args: Any) -> None:
        """The writer's thread also passes its error on to the next call."""
        if args.thread not in self._threads:
            self._hook(args)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_text(self, step: int, text: str) -> None:
        self._writer.add_text("sample", "\n".join(f"    {line}" for line in text.splitlines()), step)  # Markdown's code

    def log_gradients(self, step: int, grads: Gradients) -> None:
        grads.log(self._writer, step)
        self._writer.add_image("gradients", _pixels(grads.plot()), step, dataformats="HWC")

    def close(self, exit_code: int) -> None:
        try:
            self._writer.close()
        finally:
            for thread in self._threads:
                thread.join(5)
            threading.excepthook = self._hook


class WeightsAndBiases:
    """A run of W&B's `project`, which goes on when the run in `folder` is resumed."""

    name = "Weights & Biases"

    def __init__(self, folder: Path, config: Config, project: str) -> None:
        import wandb

        try:
            # init would ask for a key in a terminal, and wait for an answer
            if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
                raise wandb.Error("nobody is logged in")
            self._run = wandb.init(
                project=project,
                name=folder.name,
                id=_run_id(folder),
                resume="allow",
                dir=folder,
                config=dataclasses.asdict(config),
                settings=wandb.Settings(init_timeout=INIT_S, finish_timeout=FINISH_S, console="off"),
            )
        except (wandb.Error, ValueError) as error:  # the latter for invalid settings
            remedy = "Log in with `wandb login`, or set WANDB_MODE=offline and upload with `wandb sync` later"
            raise UsageError(f"cannot log to Weights & Biases: {first_line(error)}. {remedy}") from None
        # W&B's own steps must not go back, as those of a resumed run do
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._run.log({"step": step, **values})

    def log_text(self, step: int, text: str) -> None:
        import wandb

        self.log(step, {"sample": wandb.Html(f"<pre>{html.escape(text)}</pre>")})

    def log_gradients(self, step: int, grads: Gradients) -> None:
        import wandb

        scalars = _Scalars()
        grads.log(scalars, step)
        self.log(step, {**scalars.values, "gradients": wandb.Image(_pixels(grads.plot()))})

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


class _Scalars:
    """A writer for Gradients.log that keeps the values."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.values[tag] = value


def _pixels(figure: Any) -> Any:
    """A matplotlib figure as an array (height, width, 4) of uint8, without pyplot and its list of open figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def _run_id(folder: Path) -> str:
    """W&B's id of the run, kept in its folder: its name may be another run's, too, and its path may change."""
    path = folder / "wandb" / "run_id"
    if path.is_file() and (known := path.read_text(errors="replace").strip()).isalnum():
        return known
    path.parent.mkdir(parents=True, exist_ok=True)
    new = uuid.uuid4().hex[:16]
    with atomic_write(path) as temporary:
        temporary.write_text(new)
    return new


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
