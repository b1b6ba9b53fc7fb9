"""The command line: python -m triton_lstm train | gradients | bench | report | diff | tune | doctor."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from triton_lstm import commands, doctor, gradient_commands, tune_commands
from triton_lstm.config import UsageError
from triton_lstm.perf import commands as perf_commands
from triton_lstm.signals import INTERRUPTED, interrupted_by_signals


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


def _parser() -> Parser:
    parser = Parser(prog="triton-lstm", description="The LSTM of PyTorch as persistent Triton kernels.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_commands(subparsers)
    gradient_commands.add_commands(subparsers)
    perf_commands.add_commands(subparsers)
    tune_commands.add_commands(subparsers)
    doctor.add_commands(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 1 for a comparison that fails, 2 for bad input, 130 for Ctrl-C."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lives
        getattr(sys, name).reconfigure(errors="backslashreplace")  # a terminal that cannot show a letter is no failure
    args = _parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)  # for a command that starts itself again
    try:
        with interrupted_by_signals():
            status: int = args.run(args)
            sys.stdout.flush()
            return status
    except UsageError as error:
        print(f"triton-lstm {args.command}: {_one_line(str(error))}.", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate" not in str(error):
            raise
        advice = ". Lower --batch or --hidden" if args.command in ("train", "tune") else ""
        print(f"triton-lstm {args.command}: the memory is too small{advice}.", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads any more: no complaint at exit
        return 1
    except OSError as error:
        where = f"{_one_line(str(error.filename))}: " if error.filename else ""
        advice = "Free what is short" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Give another place"
        print(f"triton-lstm {args.command}: {where}{error.strerror}. {advice} and try again.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"triton-lstm {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _one_line(text: str) -> str:
    """Without line breaks and the like, which a file's name may have."""
    return "".join(c if c.isprintable() else "?" for c in text)
