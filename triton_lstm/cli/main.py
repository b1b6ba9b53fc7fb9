"""The command line: python -m triton_lstm train | runs | gradients | bench | report | diff | tune | doctor."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

import triton_lstm
from triton_lstm.cli import bench as perf_commands
from triton_lstm.cli import doctor
from triton_lstm.cli import gradients as gradient_commands
from triton_lstm.cli import runs as run_commands
from triton_lstm.cli import train as commands
from triton_lstm.cli import tune as tune_commands
from triton_lstm.settings import UsageError
from triton_lstm.system.early_interrupt import INTERRUPTED
from triton_lstm.system.signals import signals_raise_interrupt
from triton_lstm.system.terminal import escaped, sentence


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{escaped(f'{self.prog}: {sentence(message)} See {self.prog} --help.')}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Rejects unknown arguments here, so that the error message is that of the command's own parser."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def _parser() -> Parser:
    parser = Parser(prog="triton-lstm", description="The LSTM of PyTorch as persistent Triton kernels.")
    parser.add_argument("--version", action="version", version=f"triton-lstm {triton_lstm.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_commands(subparsers)
    run_commands.add_commands(subparsers)
    gradient_commands.add_commands(subparsers)
    perf_commands.add_commands(subparsers)
    tune_commands.add_commands(subparsers)
    doctor.add_commands(subparsers)
    return parser


def _print_error(args: argparse.Namespace, message: str) -> None:
    print(escaped(f"triton-lstm {args.command}: {sentence(message)}"), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 1 for a comparison that fails, 2 for bad input, 130 for Ctrl-C.

    argv: None for the process's own, in which case a command may restart itself in a new process.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lives
        getattr(sys, name).reconfigure(errors="backslashreplace")  # a character that cannot be encoded is no failure
    given = list(sys.argv[1:] if argv is None else argv)
    own_options = given[:1] == ["train"]  # parsed by another library, from its configuration
    args = _parser().parse_args(given[:1] if own_options else given)
    args.arguments = given[1:]
    args.argv = sys.argv[1:] if argv is None else None  # for a command that restarts itself
    try:
        with signals_raise_interrupt():
            status: int = args.run(args)
            sys.stdout.flush()
            return status
    except UsageError as error:
        _print_error(args, str(error))
        return 2
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate" not in str(error):
            raise
        remedies = {"train": ". Lower --batch or --hidden, or add --recompute", "tune": ". Lower --batch or --hidden"}
        _print_error(args, f"out of memory{remedies.get(args.command, '')}")
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader is gone: no error at exit
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        advice = "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Choose another path"
        _print_error(args, f"{where}{sentence(error.strerror or str(error))} {advice} and try again")
        return 2
    except KeyboardInterrupt:
        print(f"triton-lstm {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
