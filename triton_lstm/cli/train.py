"""The command train of `python -m triton_lstm`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from triton_lstm.dispatch import why_torch
from triton_lstm.module import LSTM
from triton_lstm.perf.cases import switches
from triton_lstm.settings import DTYPES, UsageError, device_for, dtype_name, require, spin_limit
from triton_lstm.system.early_interrupt import INTERRUPTED
from triton_lstm.system.signals import deferred_signals
from triton_lstm.system.terminal import print_table
from triton_lstm.training import data
from triton_lstm.training.checkpoint import (
    load_checkpoint,
    new_run,
    newest_checkpoint,
    prepare_checkpoint,
    save_checkpoint,
)
from triton_lstm.training.config import LARGE, LARGE_STEPS, LARGEST, LAYERS, RATE, SEEDS, SMALL, SMALL_STEPS, Config
from triton_lstm.training.model import bits_per_byte, build, sample
from triton_lstm.training.trainer import Trainer, compare, train_all

RUNS = Path("runs")
SAVE_EVERY, SAMPLE = 100, 120  # steps; bytes
INTERPRETED_S = 0.02  # per step of the time loop in Triton's interpreter


def positive(text: str, most: int = LARGEST) -> int:
    return _integer(text, 1, most)


def seed_number(text: str) -> int:
    return _integer(text, 0, SEEDS - 1)


def _layers(text: str) -> int:
    return positive(text, LAYERS)


def _integer(text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"must be an integer from {least} to {most}, got {text[:40]!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= RATE:
        raise argparse.ArgumentTypeError(f"must be a positive number, at most {RATE:g}, got {text!r}")
    return value


def add_commands(commands: Any) -> None:
    """Adds train to the subparsers of the command line."""
    t = commands.add_parser("train", help="train a byte-level language model on real text")
    t.add_argument("--text", nargs="+", metavar="FILE", help="default: the sources of Python's standard library")
    defaults = f"default: {SMALL_STEPS} without a GPU, {LARGE_STEPS} on one"
    t.add_argument("--steps", type=positive, help=f"train up to this step ({defaults})")
    for name, what in [
        ("hidden", "hidden units"),
        ("layers", "LSTM layers"),
        ("embed", "width of the embedding"),
        ("batch", "sequences in a batch"),
        ("seq-len", "bytes in a sequence"),
        ("warmup", "steps until the learning rate reaches --lr"),
    ]:
        kind = _layers if name == "layers" else positive
        t.add_argument(f"--{name}", type=kind, help=f"{what} (default: {_presets(name.replace('-', '_'))})")
    t.add_argument("--lr", type=_rate, help=f"peak learning rate of Adam (default: {_presets('lr')})")
    t.add_argument(
        "--dtype",
        type=dtype_name,
        choices=list(DTYPES),
        help=f"of the LSTM; tf32 and fp32 are float32 with TF32 allowed or not (default: {_presets('dtype')})",
    )
    t.add_argument("--seed", type=seed_number, help="seed of weights, batches and sample (default: 0)")
    t.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")
    t.add_argument("--checkpoint", type=Path, metavar="FILE", help=f"where to save (default: a new folder in {RUNS}/)")
    t.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    t.add_argument(
        "--save-every", type=positive, default=SAVE_EVERY, metavar="STEPS", help="default: 100, and at the end"
    )
    t.add_argument("--resume", action="store_true", help="continue from --checkpoint (default: from the newest run)")
    t.add_argument(
        "--compare", action="store_true", help="also train nn.LSTM on the same batches; exit 1 if the losses diverge"
    )
    t.add_argument(
        "--sample", type=positive, default=SAMPLE, metavar="BYTES", help="length of the sample (default: 120)"
    )
    t.set_defaults(run=_train)


def _presets(field: str) -> str:
    return f"{getattr(SMALL, field)} without a GPU, {getattr(LARGE, field)} on one"


def command_device(name: str | None) -> torch.device:
    """The device of a command; on the CPU the kernels run in Triton's interpreter."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("PyTorch found no usable GPU. Omit --device cuda to run on the CPU")
    return device_for(name)


def _config(args: argparse.Namespace, device: torch.device) -> tuple[Config, dict[str, Any] | None]:
    """The run's configuration and, with --resume, the content of the checkpoint it continues from."""
    given = {f.name: v for f in dataclasses.fields(Config) if (v := getattr(args, f.name)) is not None}
    if not args.resume:
        return dataclasses.replace(SMALL if device.type == "cpu" else LARGE, **given), None
    args.checkpoint = newest_checkpoint(args.checkpoint or RUNS)
    config, content = load_checkpoint(args.checkpoint)
    for name, value in given.items():
        if value != getattr(config, name):
            raise UsageError(
                f"{args.checkpoint} was trained with --{name.replace('_', '-')} {getattr(config, name)}, not {value}. "
                "Omit the option, or start over without --resume"
            )
    return config, content


def _train(args: argparse.Namespace) -> int:
    device = command_device(args.device)
    if args.compare:
        require("pandas", "rich")
        if args.resume:
            raise UsageError("--compare starts both models from the same weights. Omit --resume")
    config, content = _config(args, device)
    with switches(config.dtype):
        return _run(args, device, config, content)


def _run(args: argparse.Namespace, device: torch.device, config: Config, content: dict[str, Any] | None) -> int:
    """Trains, saves and reports."""
    files = [os.path.abspath(f) for f in args.text] if args.text else content["text"] if content else None
    text = data.read_text(files, config.seq_len)
    digest = data.digest(text)
    if content and content["digest"] != digest:
        raise UsageError(f"{args.checkpoint} was trained on another text. Give that one, or omit --resume")
    training, held_out = data.split(text)
    if args.checkpoint:
        prepare_checkpoint(args.checkpoint, files or [], replace=args.overwrite or args.resume)
    steps = args.steps or (SMALL_STEPS if device.type == "cpu" else LARGE_STEPS)

    trainer = _trainer(config, device, content)
    if len(trainer.losses) >= steps:
        raise UsageError(f"{args.checkpoint} is already at step {len(trainer.losses)}. Give a larger --steps")
    model = trainer.model
    trainers = [trainer]
    if args.compare:
        theirs = [build(config, device, nn.LSTM, dtype) for dtype in (config.dtype, "fp64")]
        trainers += [Trainer(other, config) for other in theirs]
    reason = checked_backend(model.dtype, device)
    checkpoint = args.checkpoint or new_run(RUNS)
    print(f"{device}: {model.lstm}, {config.dtype}; {f'PyTorch LSTM ({reason})' if reason else _kernels(device)}")
    minutes = INTERPRETED_S / 60 * 2 * config.layers * config.seq_len * (steps - len(trainer.losses))
    if device.type == "cpu" and not reason and minutes > 0.5:
        print(f"this takes about {minutes:.0f} minute{'s' if round(minutes) > 1 else ''} or more", flush=True)
    if content:
        print(f"resuming from step {len(trainer.losses)} of {checkpoint}")

    def save() -> None:
        about = {"config": dataclasses.asdict(config), "text": files, "digest": digest}
        save_checkpoint(checkpoint, about | trainer.state())

    with deferred_signals() as stop:
        try:
            train_all(trainers, training, config, steps, device, save, args.save_every, stop)
        except OSError:  # the progress bar's output was closed
            save()
            raise
        with contextlib.suppress(KeyboardInterrupt):  # a second one, raised after the save; the first is in `stop`
            save()
    losses = trainer.losses
    if stop and len(losses) < steps:
        print(f"stopped after step {len(losses)}; continue with: {_resume_command(args, checkpoint, steps)}")
    elif stop:
        print(f"stopped after step {len(losses)}, the last one; checkpoint: {checkpoint}")
    if stop:
        return INTERRUPTED
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats after {len(losses)} steps; checkpoint: {checkpoint}")
    bits = bits_per_byte(model, held_out, config, device)
    print(f"held out: {bits * math.log(2):.3f} nats or {bits:.3f} bits per byte, over all {len(held_out) - 1:,} bytes")
    print(f"sample: {sample(model, args.sample, config, device)}")
    return _report_comparison(trainers) if args.compare else 0


def _resume_command(args: argparse.Namespace, checkpoint: Path, steps: int) -> str:
    """The command that resumes a run, quoted for the shell."""
    path = f"./{checkpoint}" if str(checkpoint).startswith("-") else str(checkpoint)
    command = [sys.orig_argv[0], "-m", "triton_lstm", "train", "--resume", "--checkpoint", path, "--steps", str(steps)]
    command += ["--device", args.device] if args.device else []
    command += [] if args.sample == SAMPLE else ["--sample", str(args.sample)]
    command += [] if args.save_every == SAVE_EVERY else ["--save-every", str(args.save_every)]
    return shlex.join(command)


def _trainer(config: Config, device: torch.device, content: dict[str, Any] | None) -> Trainer:
    """A trainer at its first step, or restored from the checkpoint's `content`."""
    try:
        trainer = Trainer(build(config, device, LSTM), config)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        what = str(error).splitlines()[0][:200] if str(error) else "out of memory"
        raise UsageError(f"cannot create a model of this size ({what}). Lower --hidden, --layers or --embed") from None
    if content:
        trainer.restore(content)
    return trainer


def checked_backend(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why PyTorch's own LSTM runs; None if the kernels do. Raises UsageError for invalid settings."""
    try:
        reason = why_torch(dtype, device, None)
        if not reason:
            spin_limit()
        return None if reason is None else str(reason)
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from None


def _kernels(device: torch.device) -> str:
    interpreted = "Triton kernels in Triton's interpreter (no GPU): not a benchmark"
    return "Triton kernels" if device.type == "cuda" else interpreted


def _report_comparison(trainers: list[Trainer]) -> int:
    import pandas

    rows = compare(*(trainer.losses for trainer in trainers))
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
