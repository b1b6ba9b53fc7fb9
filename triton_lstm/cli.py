"""The command line: python -m triton_lstm train | gradients | bench | report | diff | tune | doctor."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

import triton_lstm
from triton_lstm import commands, doctor, gradient_commands, tune_commands
from triton_lstm.config import UsageError
from triton_lstm.perf import commands as perf_commands
from triton_lstm.quiet_start import INTERRUPTED
from triton_lstm.signals import interrupted_by_signals
from triton_lstm.terminal import escaped, sentence


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{escaped(f'{self.prog}: {sentence(message)} See {self.prog} --help.')}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Knows all of them or says so: a command's own parser speaks of its own arguments."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def _parser() -> Parser:
    parser = Parser(prog="triton-lstm", description="The LSTM of PyTorch as persistent Triton kernels.")
    parser.add_argument("--version", action="version", version=f"triton-lstm {triton_lstm.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_commands(subparsers)
    gradient_commands.add_commands(subparsers)
    perf_commands.add_commands(subparsers)
    tune_commands.add_commands(subparsers)
    doctor.add_commands(subparsers)
    return parser


def _tell(args: argparse.Namespace, what: str) -> None:
    print(escaped(f"triton-lstm {args.command}: {sentence(what)}"), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 1 for a comparison that fails, 2 for bad input, 130 for Ctrl-C.

    argv: None for the process's own, whose program a command may then replace by a fresh one.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lives
        getattr(sys, name).reconfigure(errors="backslashreplace")  # a terminal that cannot show a letter is no failure
    args = _parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else None  # for a command that starts itself again
    try:
        with interrupted_by_signals():
            status: int = args.run(args)
            sys.stdout.flush()
            return status
    except UsageError as error:
        _tell(args, str(error))
        return 2
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate" not in str(error):
            raise
        advice = ". Lower --batch or --hidden" if args.command in ("train", "tune") else ""
        _tell(args, f"the memory is too small{advice}")
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads any more: no complaint at exit
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        advice = "Free what is short" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Give another place"
        _tell(args, f"{where}{sentence(error.strerror or str(error))} {advice} and try again")
        return 2
    except KeyboardInterrupt:
        print(f"triton-lstm {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
