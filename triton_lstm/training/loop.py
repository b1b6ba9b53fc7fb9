"""The loop of a training run: steps, and what happens between them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from triton_lstm.settings import UsageError
from triton_lstm.system.terminal import Bar
from triton_lstm.training.batches import HeldOut, Share, Streams, Windows, load
from triton_lstm.training.checkpoint import Progress, save_checkpoint
from triton_lstm.training.config import Config, Data
from triton_lstm.training.logs.metrics import Metrics
from triton_lstm.training.model import held_out_loss, sample
from triton_lstm.training.run_folder import RunFolder
from triton_lstm.training.text.corpus import Corpus, Documents
from triton_lstm.training.trainer import Trainer

HELD_OUT_TOKENS = 8192  # of a held-out batch, or a training batch's if that is more


class Text(NamedTuple):
    """The text of a run, and its batches for training."""

    corpus: Corpus
    held_out: Documents
    batches: Streams | Windows


def open_text(config: Config, corpus: Corpus, share: Share) -> Text:
    """Splits the corpus. Raises UsageError if there is too little of it."""
    training, held_out = corpus.split()
    kind = Streams if config.data.batches == "stream" else Windows
    batches = kind(corpus, training, config.data, config.execution.seed, config.optimizer.accumulate, share)
    return Text(corpus, held_out, batches)


def _whole_batches(data: Data) -> Data:
    """The sizes of held-out batches: larger than in training, in the dimension that the loss does not depend on."""
    if data.batches == "stream":
        return dataclasses.replace(data, seq_len=max(data.seq_len, HELD_OUT_TOKENS // data.batch))
    return dataclasses.replace(data, batch=max(data.batch, HELD_OUT_TOKENS // data.seq_len))


class Validation(NamedTuple):
    """The mean loss in nats per token, the same in bits per byte of text, the number of tokens, and a sample."""

    loss: float
    bits_per_byte: float
    tokens: int
    sample: str


class Loop:
    """Trains up to the last step, logs, validates and saves.

    Args:
        metrics: None in all processes but rank 0.
        progress: of the checkpoint to continue from.
        stop: the loop ends after the step in which this gets an item, as from a signal, in one of the processes.
    """

    def __init__(
        self,
        trainer: Trainer,
        text: Text,
        folder: RunFolder,
        metrics: Metrics | None,
        progress: Progress | None = None,
        stop: Sequence[Any] = (),
    ) -> None:
        self.trainer, self.text, self.folder, self.metrics, self.stop = trainer, text, folder, metrics, stop
        self.config, self.device, self.processes = trainer.config, trainer.device, trainer.processes
        done = progress or {"seconds": 0.0, "logged": 0, "loss_sum": 0.0, "validated": 0, "best": None}
        self.seconds, self.logged, self.validated = done["seconds"], done["logged"], done["validated"]
        self.loss_sum = torch.tensor(done["loss_sum"], dtype=torch.float64, device=self.device)
        self.best = done["best"]
        self.validation: Validation | None = None
        self._since = 0.0
        self._timed = trainer.step, self.seconds  # where the measurement of tokens_per_s begins
        self._finite = True  # the last loss that was logged
        self._saved = -1, -1  # the steps in the last checkpoint that this process has saved

    def run(self, after: Callable[[Any, float], None] | None = None) -> None:
        """Trains up to the last step of the configuration, or until `stop`; validates and saves at the last step.

        after: called with the micro-batches and the loss of every step; it makes the host wait for each.
        """
        trainer, steps, accumulate = self.trainer, self.config.optimizer.steps, self.config.optimizer.accumulate
        pinned = self.device.type == "cuda"
        batches = load(self.text.batches, trainer.step, steps, accumulate, self.config.data.workers, pinned)
        self._since, first = time.perf_counter(), True
        with contextlib.closing(batches), Bar(total=steps, initial=trainer.step, unit="step") as bar:
            if self.best and self.best["step"] == trainer.step and self.metrics:
                self.folder.mark_best(trainer.step)  # a process may have been killed before that
            if trainer.step and self._validation_is_due():  # a signal came before it
                with self._paused():
                    self._validate()
                    self.save()
            while trainer.step < steps and not self._stopped():
                self.processes.at = f"step {trainer.step + 1}"
                micro = [batch.to(self.device) for batch in itertools.islice(batches, accumulate)]
                if first:
                    trainer.prepare(micro[0])
                    first = False
                loss, norm, gradients = trainer.train(micro, record=self._due(self.config.output.gradients_every, 1))
                self.loss_sum += loss
                if after:
                    with self._paused():
                        after(micro, loss.item())
                self._between_steps(bar, norm, gradients)
                bar.update()

    def _stopped(self) -> bool:
        return self.processes.any(bool(self.stop))

    def _due(self, every: int, ahead: int = 0) -> bool:
        """Whether something is due after the step that is `ahead`."""
        return every > 0 and (self.trainer.step + ahead) % every == 0

    def _validation_is_due(self) -> bool:
        due = self._due(self.config.output.validate_every) or self.trainer.step == self.config.optimizer.steps
        return due and self.validated != self.trainer.step

    def _between_steps(self, bar: Bar, norm: torch.Tensor, gradients: Any) -> None:
        output, last = self.config.output, self.trainer.step == self.config.optimizer.steps
        if self._due(output.log_every) or last:
            self._log(bar, norm)
        if gradients is not None and self.metrics:
            with self._paused():
                self.metrics.log_gradients(self.trainer.step, gradients)
        if self._validation_is_due():
            with self._paused():
                self._validate()
        if self._due(output.save_every) or last:
            with self._paused():
                self.save()

    def _log(self, bar: Bar, norm: torch.Tensor) -> None:
        step = self.trainer.step
        loss = self.loss_sum.item() / (step - self.logged)  # waits for the GPU, so that the time is right
        self._lap()
        tokens_per_step = self.config.data.batch * self.config.data.seq_len * self.config.optimizer.accumulate
        first, seconds = self._timed
        rate = tokens_per_step * (step - first) / max(self.seconds - seconds, 1e-9)
        if self.metrics:
            self.metrics.log(
                step,
                tokens=tokens_per_step * step,
                seconds=self.seconds,
                loss=loss,
                lr=self.config.optimizer.rate(step - 1),
                grad_norm=norm.item(),
                tokens_per_s=rate,
                **({"loss_scale": self.trainer.scaler.get_scale()} if self.trainer.scaler.is_enabled() else {}),
            )
        if not math.isfinite(loss) and self._finite and self.metrics:
            Bar.write(f"step {step}: the loss is {loss}. The best model so far is kept", file=sys.stderr)
        self._finite = math.isfinite(loss)
        self.logged, self._timed = step, (step, self.seconds)
        self.loss_sum.zero_()
        bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)

    def _validate(self) -> None:
        """Logs the loss on all held-out text; saves the model if it is the best so far."""
        found = self._held_out()
        if found is None:
            return
        self.validation, step = found, self.trainer.step
        if self.metrics:
            self.metrics.log(step, validation_loss=found.loss, bits_per_byte=found.bits_per_byte)
            self.metrics.log_text(step, found.sample)
        self.validated = step
        if math.isfinite(found.loss) and (self.best is None or found.loss < self.best["loss"]):
            before, self.best = self.best, {"step": step, "loss": found.loss}
            try:
                self.save()
                if self.metrics:
                    self.folder.mark_best(step)
            except UsageError:
                self.best = before
                raise

    def _held_out(self) -> Validation | None:
        config, (corpus, documents, _) = self.config, self.text
        share = Share(*self.processes.place)
        batches = HeldOut(corpus, documents, _whole_batches(config.data), share)
        found = held_out_loss(self.trainer.model, batches, config, self.device, self._stopped)
        if found is None:
            return None
        nats, tokens = self.processes.sum(torch.tensor(found, dtype=torch.float64, device=self.device)).tolist()
        written = sample(self.trainer.model, corpus.vocabulary, config.output.sample, config, self.device)
        return Validation(nats / tokens, nats / math.log(2) / documents.source_bytes, int(tokens), written)

    def save(self) -> None:
        """Saves the present step, and deletes the oldest checkpoints beyond `keep`."""
        if self._saved == (self.trainer.step, self.validated):
            return
        if self.metrics:
            self.metrics.sync()
        at = self.folder.at(self.trainer.step)
        save_checkpoint(at, self._state(), self.trainer.tensors(), self.processes)
        self._saved = self.trainer.step, self.validated
        if self.metrics:
            self.folder.keep(self.config.output.keep)

    def _state(self) -> dict[str, Any]:
        progress: Progress = {
            "seconds": self.seconds,
            "logged": self.logged,
            "loss_sum": self.loss_sum.item(),
            "validated": self.validated,
            "best": self.best,
        }
        return {
            "config": self.config,
            "digest": self.text.corpus.digest,
            "tokens": self.text.corpus.vocabulary.size,
            "progress": progress,
            **self.trainer.state(),
        }

    def _lap(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """Inside the block the time does not count as training."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._lap()
        yield
        self._since = time.perf_counter()
