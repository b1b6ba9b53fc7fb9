"""What `train` says: what runs, how it ended, and how a run that was stopped goes on."""

from __future__ import annotations

import errno
import math
import os
import shlex
import sys
from typing import TYPE_CHECKING, NoReturn

import torch

from triton_lstm.settings import UsageError
from triton_lstm.system.early_interrupt import INTERRUPTED
from triton_lstm.system.terminal import print_table

if TYPE_CHECKING:  # they need the packages that `train` asks for
    from triton_lstm.training.compare import Comparison
    from triton_lstm.training.loop import Loop
    from triton_lstm.training.processes import Processes
    from triton_lstm.training.run_folder import RunFolder
    from triton_lstm.training.trainer import Trainer

INTERPRETED_S = 0.01  # per step of the time loop in Triton's interpreter


def announce(trainer: Trainer, folder: RunFolder, reason: str | None, resumed: bool) -> None:
    """Says what runs where, and about how long if that is slow."""
    config, device, model = trainer.config, trainer.device, trainer.model
    where = f"PyTorch LSTM ({reason})" if reason else _kernels(device)
    several = f"; {trainer.processes.size} processes, {config.execution.strategy}" if trainer.processes.size > 1 else ""
    print(f"{device}: LSTM({model.lstm.extra_repr()}), {config.execution.dtype}; {where}{several}")
    steps = (config.optimizer.steps - trainer.step) * config.optimizer.accumulate
    minutes = INTERPRETED_S / 60 * 2 * config.model.layers * config.data.seq_len * steps
    if device.type == "cpu" and not reason and minutes > 0.5:
        print(f"this takes about {minutes:.0f} minute{'s' if round(minutes) > 1 else ''} or more")
    print(f"resuming {folder} from step {trainer.step}" if resumed else f"run: {folder}", flush=True)


def _kernels(device: torch.device) -> str:
    interpreted = "Triton kernels in Triton's interpreter (no GPU): not a benchmark"
    return "Triton kernels" if device.type == "cuda" else interpreted


def report_stop(folder: RunFolder, steps: int, validated: int, processes: Processes) -> int:
    """Says how a run that was stopped by a signal goes on."""
    from triton_lstm.training.run_folder import step_of

    saved = folder.steps()
    if not saved:
        print("stopped before the first checkpoint")
    elif (step := step_of(saved[-1])) < steps or step != validated:
        print(f"stopped after step {step}; continue with: {_resume_command(folder, processes)}")
    else:
        print(f"stopped after step {step}, the last one; run: {folder}")
    return INTERRUPTED


def is_dead_worker(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def raise_with_advice(error: BaseException, folder: RunFolder, processes: Processes) -> NoReturn:
    """Raises what can be mended as a UsageError, with the command that goes on; says that command for anything else."""
    from triton_lstm.training.processes import ReportedError
    from triton_lstm.training.run_folder import FULL

    if isinstance(error, ReportedError):
        raise error
    command = _resume_command(folder, processes) if folder.steps() else None
    if why := processes.explain(error):
        raise UsageError(f"{why}. " + (f"Continue with: {command}" if command else "Start again")) from None
    if (isinstance(error, OSError | UsageError) and not isinstance(error, BrokenPipeError)) or is_dead_worker(error):
        full = os.strerror(errno.ENOSPC) in str(error) or getattr(error, "errno", None) in FULL
        remedy = "Lower --workers" if is_dead_worker(error) else "Free some space" if full else "See to it"
        go_on = f"continue with: {command}" if command else "start again"
        raise UsageError(f"{_reason(error)}. {remedy}, and {go_on}") from None
    if command and processes.rank == 0 and not isinstance(error, BrokenPipeError):
        print(f"continue with: {command}", file=sys.stderr)
    raise error


def _resume_command(folder: RunFolder, processes: Processes) -> str:
    """The command that resumes a run, quoted for the shell."""
    path = f"./{folder}" if str(folder).startswith("-") else str(folder)
    python = [sys.orig_argv[0]]
    if processes.size > 1:
        here = processes.local_size == processes.size
        python = ["torchrun", *(["--nproc-per-node", str(processes.size)] if here else ["..."])]
    return shlex.join([*python, "-m", "triton_lstm", "train", "--resume", "--folder", path])


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    return str(error).rstrip(".").splitlines()[0]


def report(loop: Loop, folder: RunFolder) -> None:
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


def report_comparison(comparison: Comparison) -> int:
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
