"""The command train of `python -m triton_lstm`."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from triton_lstm.cli.common import checked_backend, command_device
from triton_lstm.cli.train_report import (
    announce,
    is_dead_worker,
    raise_with_advice,
    report,
    report_comparison,
    report_stop,
)
from triton_lstm.module import LSTM
from triton_lstm.settings import DTYPES, UsageError, require, switches
from triton_lstm.system.signals import deferred_signals
from triton_lstm.system.terminal import Bar

if TYPE_CHECKING:  # they need the packages that `_train` asks for
    from triton_lstm.cli.train_options import Options
    from triton_lstm.training.compare import Comparison
    from triton_lstm.training.config import Config
    from triton_lstm.training.loop import Loop
    from triton_lstm.training.processes import Processes
    from triton_lstm.training.text.corpus import Corpus
    from triton_lstm.training.trainer import Trainer

PACKAGES = ("pydantic", "cyclopts", "safetensors", "yaml")


def add_commands(commands: Any) -> None:
    """Adds train to the subparsers of the command line; its own options are parsed by train_options."""
    t = commands.add_parser("train", help="train a language model on text")
    t.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    require(*PACKAGES, extra="train")
    from triton_lstm.training.processes import ReportedError, joined

    try:
        with joined() as processes, _only_rank_zero_talks(processes):
            try:
                options = processes.checked(lambda: _checked_options(args.arguments, processes))
                return _run_on(options, processes) if options else 0
            except RuntimeError as error:
                if why := processes.explain(error):
                    raise UsageError(f"{why}. Start again") from None
                raise
    except ReportedError:
        return 2


@contextlib.contextmanager
def _only_rank_zero_talks(processes: Processes) -> Iterator[None]:
    """The others do in errors that they alone have."""
    from triton_lstm.training.processes import ReportedError

    if processes.rank == 0:
        yield
        return
    Bar.silent = True
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            yield
        except ReportedError:
            raise
        except UsageError as error:
            raise UsageError(f"rank {processes.rank}: {error}") from None


def _checked_options(arguments: list[str], processes: Processes) -> Options | None:
    """The options; None for help. Raises UsageError for what cannot run here."""
    from triton_lstm.cli import train_options
    from triton_lstm.training.compare import check_comparable
    from triton_lstm.training.logs.trackers import require_trackers

    options = train_options.parse(arguments, processes)
    if options is None:
        return None
    config = options.config
    device = _device(config, processes)
    if config.execution.cuda_graphs and device.type != "cuda":
        raise UsageError("--cuda-graphs needs a GPU. Omit it")
    require_trackers(config)
    if options.compare:
        require("pandas", "rich", extra="train")
        if options.state:
            raise UsageError("--compare starts both models from the same weights. Omit --resume")
        if processes.size > 1:
            raise UsageError("--compare needs a single process. Omit it, or torchrun")
        check_comparable(config, device)
    if config.data.batch % processes.size:
        raise UsageError(
            f"--batch {config.data.batch} cannot be divided between {processes.size} processes. "
            + ("Start another number of them" if options.state else "Choose a multiple")
        )
    if config.execution.strategy == "fsdp" and (config.execution.compile or config.execution.cuda_graphs):
        raise UsageError("--strategy fsdp has neither --compile nor --cuda-graphs. Omit those, or choose ddp")
    reason = checked_backend(DTYPES[config.execution.dtype], device)
    if reason and config.execution.cuda_graphs and config.data.reset:
        raise UsageError(f"PyTorch's own LSTM runs here ({reason}), which CUDA graphs cannot capture. Add --no-reset")
    if reason and device.type == "cpu" and config.execution.dtype == "fp16" and not config.data.reset:
        raise UsageError(f"PyTorch's own LSTM runs here ({reason}), which has no fp16. Choose --dtype bf16 or fp32")
    if config.model.dropout and config.model.layers == 1:
        raise UsageError("--dropout is between layers: with --layers 1 it has no effect. Omit it, or add a layer")
    return options


def _device(config: Config, processes: Processes) -> torch.device:
    """A device of this process's own."""
    device = command_device(config.execution.device)
    if device.type == "cpu":
        return device
    if processes.local_size > torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        what = f"{processes.local_size} processes on a machine with {gpus} GPU{'s' if gpus > 1 else ''}"
        raise UsageError(f"{what}. Start torchrun with --nproc-per-node {gpus}")
    device = torch.device("cuda", processes.local_rank)
    torch.cuda.set_device(device)
    return device


def _run_on(options: Options, processes: Processes) -> int:
    """Trains with PyTorch's switches as the configuration wants them."""
    from triton_lstm.training.trainer import determinism

    execution = options.config.execution
    device = _device(options.config, processes)
    reason = checked_backend(DTYPES[execution.dtype], device)
    threads = 1 if device.type == "cpu" and not reason else torch.get_num_threads()
    with switches(execution.dtype), determinism(execution.deterministic), _threads(threads):
        return _run(options, device, reason, processes)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Triton's interpreter computes with small arrays, for which PyTorch's threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(options: Options, device: torch.device, reason: str | None, processes: Processes) -> int:
    """Trains, saves and reports."""
    from triton_lstm.cli.train_options import RUNS
    from triton_lstm.training.batches import Share
    from triton_lstm.training.compare import Comparison
    from triton_lstm.training.logs.metrics import Metrics
    from triton_lstm.training.loop import Loop, open_text
    from triton_lstm.training.run_folder import RunFolder, new_run, step_of

    config, state = options.config, options.state
    text = processes.checked(lambda: open_text(config, _corpus(options, processes), Share(*processes.place)))
    tokens = text.corpus.vocabulary.size
    processes.check_alike(_fingerprint(options, text.corpus.digest))
    processes.open(device, config.execution.timeout)
    trainer = processes.checked(lambda: _trainer(config, tokens, device, processes))
    progress = state["progress"] if state else None
    if state and progress:
        _restore(trainer, options, processes)
        if trainer.step >= config.optimizer.steps and progress["validated"] == trainer.step:
            return _complete(options, trainer.step)
    comparison = Comparison(config, tokens, device) if options.compare else None

    path = processes.from_rank_zero(lambda: (options.folder or new_run(options.path, RUNS, options.repeated)).path)
    folder = RunFolder(path)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(deferred_signals())

        def begin() -> Metrics:
            stack.enter_context(folder.locked(processes.may_be_restarted))
            if progress and step_of(folder.steps()[-1]) != trainer.step:
                raise UsageError(f"another process has gone on with {folder} meanwhile. Start again")
            folder.prepare()
            folder.write_about(config, device, text.corpus.digest, processes.size)
            return stack.enter_context(Metrics(folder.path, config, trainer.step))

        metrics = processes.checked(lambda: begin() if processes.rank == 0 else None)
        loop = Loop(trainer, text, folder, metrics, progress, stop)
        announce(trainer, folder, reason, resumed=progress is not None)
        try:
            stopped = _train_until_stopped(loop, comparison)
        except BaseException as error:
            raise_with_advice(error, folder, processes)
    if stopped:
        return report_stop(folder, config.optimizer.steps, loop.validated, processes)
    report(loop, folder)
    return report_comparison(comparison) if comparison else 0


def _train_until_stopped(loop: Loop, comparison: Comparison | None) -> bool:
    """Trains, and saves also if it does not come to the last step. Returns whether a signal has stopped it."""
    trainer, processes = loop.trainer, loop.processes
    try:
        loop.run(comparison.step if comparison else None)
    except BaseException as error:
        if trainer.between_steps and trainer.step and processes.size == 1:
            with contextlib.suppress(Exception):  # the first error counts
                loop.save()
        if not (loop.stop and is_dead_worker(error)):  # ended by a signal to all processes
            raise
    stopped = processes.any(bool(loop.stop))
    if stopped and trainer.between_steps:
        with contextlib.suppress(KeyboardInterrupt):  # a second one, raised after the save
            loop.save()
    return stopped


def _corpus(options: Options, processes: Processes) -> Corpus:
    """The text: one process of each machine reads it first, and the others what that has written to the cache."""
    from triton_lstm.training.text.corpus import open_corpus

    first = processes.local_rank == 0
    corpus = processes.checked(lambda: open_corpus(options.config.data) if first else None)
    corpus = corpus or open_corpus(options.config.data)
    if options.state and options.state["digest"] != corpus.digest:
        raise UsageError(
            f"{options.folder} was trained on another text, or with another tokenizer. Give those with --text and "
            "--tokenizer, or omit --resume"
        )
    return corpus


def _fingerprint(options: Options, digest: str) -> dict[str, Any]:
    """What has to be the same in all processes, by what it is."""
    from triton_lstm.system.machine import PACKAGE, hash_of
    from triton_lstm.training.config import for_file

    config, own = for_file(options.config), ("text", "tokenizer", "cache")  # paths
    values = {f"--{name.replace('_', '-')}": value for name, value in config.items() if name not in own}
    step = options.state["step"] if options.state else 0
    return {
        "version of triton_lstm": f"sources {hash_of(PACKAGE)}",
        "version of torch": torch.__version__,
        "text": f"one with SHA-256 {digest[:12]}",
        "checkpoint to continue from": f"step {step}",
        **values,
    }


def _trainer(config: Config, tokens: int, device: torch.device, processes: Processes) -> Trainer:
    """A trainer at its first step."""
    from triton_lstm.training.model import build, check_memory
    from triton_lstm.training.trainer import Trainer

    # What is sharded need not fit the device as a whole
    place = torch.device("cpu") if config.execution.strategy == "fsdp" and processes.group else device
    try:
        check_memory(config, tokens, device, shards=processes.size if place != device else 1)
        model = build(config, tokens, place, LSTM, recompute=config.model.recompute)
        return Trainer(model, config, device, processes)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        what = str(error).splitlines()[0][:200] if str(error) else "out of memory"
        raise UsageError(f"cannot create a model of this size ({what}). Lower --hidden, --layers or --embed") from None


def _restore(trainer: Trainer, options: Options, processes: Processes) -> None:
    from triton_lstm.training.checkpoint import load_tensors

    assert options.checkpoint and options.state
    tensors = trainer.tensors()
    load_tensors(options.checkpoint, tensors, processes, options.advice)
    trainer.load(dict(options.state), tensors)


def _complete(options: Options, step: int) -> int:
    """Nothing is left to do, which is no error for a command that is repeated until it succeeds."""
    if options.repeated:
        print(f"{options.folder} is already at step {step}, the last one")
        return 0
    raise UsageError(f"{options.folder} is already at step {step}. Give a larger --steps")
