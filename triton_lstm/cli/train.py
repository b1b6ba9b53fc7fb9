"""The command train of `python -m triton_lstm`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import os
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from triton_lstm.cli.common import checked_backend, command_device
from triton_lstm.module import LSTM
from triton_lstm.settings import DTYPES, UsageError, require, switches
from triton_lstm.system.early_interrupt import INTERRUPTED
from triton_lstm.system.signals import deferred_signals
from triton_lstm.system.terminal import print_table

if TYPE_CHECKING:  # they need the packages that `_train` asks for
    from triton_lstm.cli.train_options import Options
    from triton_lstm.training.checkpoint import Content
    from triton_lstm.training.compare import Comparison
    from triton_lstm.training.config import Config
    from triton_lstm.training.loop import Loop
    from triton_lstm.training.run_folder import RunFolder
    from triton_lstm.training.trainer import Trainer

PACKAGES = ("pydantic", "cyclopts", "yaml")
INTERPRETED_S = 0.01  # per step of the time loop in Triton's interpreter


def add_commands(commands: Any) -> None:
    """Adds train to the subparsers of the command line; its own options are parsed by train_options."""
    t = commands.add_parser("train", help="train a language model on text")
    t.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    require(*PACKAGES, extra="train")
    from triton_lstm.cli import train_options
    from triton_lstm.training.compare import check_comparable
    from triton_lstm.training.logs.trackers import require_trackers
    from triton_lstm.training.trainer import determinism

    options = train_options.parse(args.arguments)
    if options is None:  # help
        return 0
    config = options.config
    device = command_device(config.execution.device)
    if config.execution.cuda_graphs and device.type != "cuda":
        raise UsageError("--cuda-graphs needs a GPU. Omit it")
    require_trackers(config)
    if options.compare:
        require("pandas", "rich", extra="train")
        if options.content:
            raise UsageError("--compare starts both models from the same weights. Omit --resume")
        check_comparable(config, device)
    reason = checked_backend(DTYPES[config.execution.dtype], device)
    if reason and config.execution.cuda_graphs and config.data.reset:
        raise UsageError(f"PyTorch's own LSTM runs here ({reason}), which CUDA graphs cannot capture. Add --no-reset")
    if reason and device.type == "cpu" and config.execution.dtype == "fp16" and not config.data.reset:
        raise UsageError(f"PyTorch's own LSTM runs here ({reason}), which has no fp16. Choose --dtype bf16 or fp32")
    if config.model.dropout and config.model.layers == 1:
        raise UsageError("--dropout is between layers: with --layers 1 it has no effect. Omit it, or add a layer")
    threads = 1 if device.type == "cpu" and not reason else torch.get_num_threads()
    with switches(config.execution.dtype), determinism(config.execution.deterministic), _threads(threads):
        return _run(options, device, reason)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Triton's interpreter computes with small arrays, for which PyTorch's threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(options: Options, device: torch.device, reason: str | None) -> int:
    """Trains, saves and reports."""
    from triton_lstm.cli.train_options import RUNS
    from triton_lstm.training.compare import Comparison
    from triton_lstm.training.logs.metrics import Metrics
    from triton_lstm.training.loop import Loop, open_text
    from triton_lstm.training.run_folder import new_run, step_of
    from triton_lstm.training.text.corpus import open_corpus

    config, content = options.config, options.content
    corpus = open_corpus(config.data)
    if content and content["digest"] != corpus.digest:
        raise UsageError(
            f"{options.folder} was trained on another text, or with another tokenizer. Give those with --text and "
            "--tokenizer, or omit --resume"
        )
    text, tokens = open_text(config, corpus), corpus.vocabulary.size
    trainer = _trainer(config, tokens, device, content)
    comparison = Comparison(config, tokens, device) if options.compare else None
    progress = content["progress"] if content else None
    if progress and trainer.step >= config.optimizer.steps and progress["validated"] == trainer.step:
        raise UsageError(f"{options.folder} is already at step {trainer.step}. Give a larger --steps")
    options.content = content = None  # as large as the model and its moments

    folder = options.folder or new_run(options.run, RUNS)
    with folder.locked(), deferred_signals() as stop:
        if progress and step_of(folder.steps()[-1]) != trainer.step:
            raise UsageError(f"another process has gone on with {folder} meanwhile. Start again")
        folder.prepare()
        folder.write_about(config, device, text.corpus.digest)
        with Metrics(folder.path, config, trainer.step) as metrics:
            loop = Loop(trainer, text, folder, metrics, progress, stop)
            _announce(trainer, folder, reason, resumed=progress is not None)
            try:
                loop.run(comparison.step if comparison else None)
            except BaseException as error:
                if trainer.between_steps and trainer.step:
                    with contextlib.suppress(Exception):  # the first error counts
                        loop.save()
                if not (stop and _is_dead_worker(error)):  # ended by a signal to all processes
                    _raise_with_advice(error, folder)
            if stop and trainer.between_steps:
                with contextlib.suppress(KeyboardInterrupt):  # a second one, raised after the save
                    loop.save()
    if stop:
        return _report_stop(folder, config.optimizer.steps, validated=loop.validated)
    _report(loop, folder)
    return _report_comparison(comparison) if comparison else 0


def _trainer(config: Config, tokens: int, device: torch.device, content: Content | None) -> Trainer:
    """A trainer at its first step, or restored from a checkpoint."""
    from triton_lstm.training.model import build, check_memory
    from triton_lstm.training.trainer import Trainer

    try:
        check_memory(config, tokens, device)
        model = build(config, tokens, device, LSTM, recompute=config.model.recompute)
        trainer = Trainer(model, config, device)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        what = str(error).splitlines()[0][:200] if str(error) else "out of memory"
        raise UsageError(f"cannot create a model of this size ({what}). Lower --hidden, --layers or --embed") from None
    if content:
        trainer.load_state_dict(dict(content))
    return trainer


def _announce(trainer: Trainer, folder: RunFolder, reason: str | None, resumed: bool) -> None:
    """Says what runs where, and about how long if that is slow."""
    config, device, model = trainer.config, trainer.device, trainer.model
    where = f"PyTorch LSTM ({reason})" if reason else _kernels(device)
    print(f"{device}: {model.lstm}, {config.execution.dtype}; {where}")
    steps = (config.optimizer.steps - trainer.step) * config.optimizer.accumulate
    minutes = INTERPRETED_S / 60 * 2 * config.model.layers * config.data.seq_len * steps
    if device.type == "cpu" and not reason and minutes > 0.5:
        print(f"this takes about {minutes:.0f} minute{'s' if round(minutes) > 1 else ''} or more")
    print(f"resuming {folder} from step {trainer.step}" if resumed else f"run: {folder}", flush=True)


def _kernels(device: torch.device) -> str:
    interpreted = "Triton kernels in Triton's interpreter (no GPU): not a benchmark"
    return "Triton kernels" if device.type == "cuda" else interpreted


def _report_stop(folder: RunFolder, steps: int, validated: int) -> int:
    """Says how a run that was stopped by a signal goes on."""
    from triton_lstm.training.run_folder import step_of

    saved = folder.steps()
    if not saved:
        print("stopped before the first checkpoint")
    elif (step := step_of(saved[-1])) < steps or step != validated:
        print(f"stopped after step {step}; continue with: {_resume_command(folder)}")
    else:
        print(f"stopped after step {step}, the last one; run: {folder}")
    return INTERRUPTED


def _is_dead_worker(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def _raise_with_advice(error: BaseException, folder: RunFolder) -> NoReturn:
    """Raises what can be mended as a UsageError, with the command that goes on; says that command for anything else."""
    from triton_lstm.training.run_folder import FULL

    command = _resume_command(folder) if folder.steps() else None
    if (isinstance(error, OSError | UsageError) and not isinstance(error, BrokenPipeError)) or _is_dead_worker(error):
        full = os.strerror(errno.ENOSPC) in str(error) or getattr(error, "errno", None) in FULL
        remedy = "Lower --workers" if _is_dead_worker(error) else "Free some space" if full else "See to it"
        go_on = f"continue with: {command}" if command else "start again"
        raise UsageError(f"{_reason(error)}. {remedy}, and {go_on}") from None
    if command and not isinstance(error, BrokenPipeError):
        print(f"continue with: {command}", file=sys.stderr)
    raise error


def _resume_command(folder: RunFolder) -> str:
    """The command that resumes a run, quoted for the shell."""
    path = f"./{folder}" if str(folder).startswith("-") else str(folder)
    return shlex.join([sys.orig_argv[0], "-m", "triton_lstm", "train", "--resume", "--run", path])


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    return str(error).rstrip(".").splitlines()[0]


def _report(loop: Loop, folder: RunFolder) -> None:
    """What came out of a whole run."""
    found = loop.validation
    assert found is not None, "a run ends with a validation"
    tokens = loop.text.corpus.vocabulary.size
    print(f"{loop.trainer.step} steps; run: {folder}")
    print(
        f"held out: {found.loss:.3f} nats per token or {found.bits_per_byte:.3f} bits per byte, over all "
        f"{found.tokens:,} tokens; {math.log(tokens):.3f} nats if all {tokens:,} tokens were equally likely"
    )
    print(f"sample: {found.sample}")


def _report_comparison(comparison: Comparison) -> int:
    import pandas

    rows = comparison.rows()
    bad = [row for row in rows if not row["ok"]]
    every = max(1, len(rows) // 20)
    shown = [row for row in rows if row["step"] % every == 0 or row is rows[-1] or not row["ok"]]
    print_table(pandas.DataFrame(shown))
    if bad:
        print(
            f"triton_lstm and nn.LSTM diverge at step {bad[0]['step']}: "
            f"{len(bad)} of {len(rows)} losses differ by more than is allowed"
        )
        return 1
    print(f"triton_lstm and nn.LSTM agree at all {len(rows)} steps")
    return 0
