"""The command tune of `python -m triton_lstm`."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from triton_lstm.backend import device_for
from triton_lstm.config import UsageError, require
from triton_lstm.devices import GPUS, Device
from triton_lstm.table_file import DTYPES, Key, TableError, bucket, file_name, read, update
from triton_lstm.tables import FOLDER, remember, user_folder
from triton_lstm.tune_progress import Progress

if TYPE_CHECKING:
    from triton_lstm.tune_report import Shape

SHOWING = ("pandas", "matplotlib", "rich", "tabulate", "jinja2")


def add_commands(commands: Any) -> None:
    """Adds tune to the subparsers of the command line."""
    t = commands.add_parser("tune", help="measure the best config per shape on this GPU; continues where it stopped")
    t.add_argument("--hidden", type=_sizes, default=[256, 512, 768, 1024], metavar="N[,N]", help="hidden units")
    t.add_argument("--batch", type=_sizes, default=[16, 64], metavar="N[,N]", help="rows; measured at powers of two")
    t.add_argument("--dtype", type=_dtypes, default=["bf16"], metavar="NAME[,NAME]", help=", ".join(DTYPES))
    t.add_argument(
        "--budget", type=_seconds, default=math.inf, metavar="TIME", help="start nothing new after 300s, 10m"
    )
    t.add_argument(
        "--out", type=Path, metavar="FILE", help="the table (default: this GPU's in the user's cache folder)"
    )
    t.add_argument("--again", action="store_true", help="measure again what the table has")
    t.add_argument("--verbose", action="store_true", help="show every config, and why one was dropped")
    t.add_argument("--dry-run", action="store_true", help="show what is planned and predicted; needs no GPU")
    t.add_argument("--gpu", choices=list(GPUS), help="with --dry-run: for this GPU instead of the one that is here")
    t.set_defaults(run=tune)


def _sizes(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 1 << 16 for part in parts):
        raise argparse.ArgumentTypeError(f"must be whole numbers from 1 to {1 << 16}, as in 512,768; got {text!r}")
    return list(dict.fromkeys(map(int, parts)))


def _dtypes(text: str) -> list[str]:
    parts = text.split(",")
    for part in parts:
        if part not in DTYPES:
            raise argparse.ArgumentTypeError(f"there is no {part!r}. There are {', '.join(DTYPES)}")
    return list(dict.fromkeys(parts))


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], text[-1:]) if text[-1:] in units else (text, "s")
    if not number.isascii() or not number.isdigit() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"must be a time such as 300s, 10m or 1h, got {text!r}")
    return float(int(number) * units[unit])


def tune(args: argparse.Namespace) -> int:
    """0; 1 where a shape could not be tuned; 130 when interrupted."""
    shapes = list(dict.fromkeys(itertools.product(args.dtype, args.hidden, map(bucket, args.batch))))
    require(*SHOWING)
    if args.dry_run:
        from triton_lstm.tune_report import print_plans

        print_plans(GPUS[args.gpu] if args.gpu else _device_here(), shapes, args.verbose)
        return 0
    if args.gpu:
        raise UsageError("--gpu is for --dry-run: only the GPU that is here can be measured")
    if not torch.cuda.is_available():
        raise UsageError(
            "no GPU that PyTorch can use was found, and nothing was measured. With --dry-run --gpu H200, say, the "
            "plans for another machine are shown"
        )
    require("filelock", "triton")
    import filelock

    device = device_for("cuda")
    path = args.out or default_path(torch.cuda.get_device_name(device))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(path.with_suffix(".tuning.lock"), timeout=0):
            return _tune(args, shapes, path, device)
    except filelock.Timeout:
        raise UsageError(f"another tune is filling {path}. Wait for it, or give another file with --out") from None


def default_path(gpu: str) -> Path:
    folder = user_folder()
    if folder is None:
        raise UsageError(f"platformdirs is not installed: name the table with --out, or its folder in {FOLDER}")
    return folder / file_name(gpu)


def _tune(args: argparse.Namespace, shapes: list[Shape], path: Path, device: torch.device) -> int:
    from triton_lstm import tune as tuning
    from triton_lstm.kernels import device_facts
    from triton_lstm.perf.failures import DeviceLostError
    from triton_lstm.perf.watchdog import HANG_S, watched
    from triton_lstm.tune_report import print_tuned, row_of

    about = tuning.about(device)
    _write(path, about)
    progress, failed, stopped = Progress(path.with_suffix(".running")), [], ""
    ends = time.monotonic() + args.budget
    try:
        with watched(progress.path, lambda: start_again(args, f"no answer for {HANG_S} s")):
            for key in _keys(args, shapes, path, progress):
                if time.monotonic() > ends:
                    stopped = "the budget is spent"
                    break
                reason = _tune_key(args, key, path, about, device, progress)
                if reason:
                    failed.append(row_of(key) | {"reason": reason})
                progress.done(key)
    except DeviceLostError as lost:
        start_again(args, f"this process cannot go on with the GPU ({lost})")
    except KeyboardInterrupt:
        stopped = "interrupted"
    progress.end()
    print_tuned(read(path), shapes, device_facts(device), failed)
    print(f"table: {path}")
    if stopped:
        print(f"{stopped}; the same command continues from here")
    return 130 if stopped == "interrupted" else int(bool(failed))


def _keys(args: argparse.Namespace, shapes: list[Shape], path: Path, progress: Progress) -> Iterator[Key]:
    """What is to be measured, with a bar that counts it."""
    from tqdm import tqdm

    keys = [Key(backward, *shape) for shape in shapes for backward in (False, True)]
    known = read(path).plans if not args.again else {}
    wanted = [key for key in keys if key not in known and not progress.is_done(key)]
    return iter(tqdm(wanted, unit="loop", disable=None))


def _tune_key(
    args: argparse.Namespace, key: Key, path: Path, about: dict[str, str], device: torch.device, progress: Progress
) -> str | None:
    """Measures a key, and with its backward pass the whole layer; returns why it could not."""
    from triton_lstm import tune as tuning
    from triton_lstm.perf.cases import switches
    from triton_lstm.perf.failures import device_still_there, failure
    from triton_lstm.tune_report import print_trials

    try:
        with switches(key.dtype):
            trials = tuning.measure(key, device, begin=progress.trial(key), again=args.again)
            found = tuning.best(key, trials)
            print_trials(key, trials, args.verbose)
            if found is None:
                return trials[0].reason
            remember(about["gpu"], found)
            _write(path, about, found)
            if key.backward:
                _write(path, about, *tuning.layer_times(key.dtype, key.H, key.B, device))
    except (RuntimeError, MemoryError, ValueError) as error:
        device_still_there(device)
        return str(failure(error)["reason"])
    return None


def _write(path: Path, about: dict[str, str], *entries: Any) -> None:
    try:
        update(path, about, *entries)
    except TableError as error:
        raise UsageError(f"{path} cannot be added to: {error}. Give another file with --out, or move it away") from None


def start_again(args: argparse.Namespace, why: str) -> NoReturn:
    print(f"{why}; continuing in a fresh one", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "triton_lstm", *args.argv])


def _device_here() -> Device:
    if not torch.cuda.is_available():
        raise UsageError("no GPU that PyTorch can use was found. Name one with --gpu")
    from triton_lstm.kernels import device_facts

    return device_facts(device_for("cuda"))
