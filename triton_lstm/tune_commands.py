"""The command tune of `python -m triton_lstm`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from triton_lstm.backend import device_for
from triton_lstm.config import UsageError, require
from triton_lstm.devices import GPUS, Device, known_gpu
from triton_lstm.table_file import DTYPES, Key, Table, TableError, bucket, file_name, read, update
from triton_lstm.tables import FOLDER, remember, user_folder
from triton_lstm.tune_progress import Progress

if TYPE_CHECKING:
    from triton_lstm.tune_report import Shape

SHOWING = ("pandas", "matplotlib", "rich", "tabulate", "jinja2")


def add_commands(commands: Any) -> None:
    """Adds tune to the subparsers of the command line."""
    t = commands.add_parser("tune", help="measure the best config per shape on this GPU; continues where it stopped")
    t.add_argument("--hidden", type=_sizes, default=[256, 512, 768, 1024], metavar="N[,N]", help="hidden units")
    t.add_argument(
        "--batch",
        type=_sizes,
        default=[16, 64],
        metavar="N[,N]",
        help="rows; measured at the next power of two from 16",
    )
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
    t.add_argument("--gpu", type=_gpu, metavar="NAME", help=f"with --dry-run: for another GPU; {', '.join(GPUS)}")
    t.set_defaults(run=tune)


def _sizes(text: str) -> list[int]:
    parts = text.split(",")
    if not all(p.isascii() and p.isdigit() and len(p) < 6 and 0 < int(p) <= 1 << 16 for p in parts):
        raise argparse.ArgumentTypeError(f"must be whole numbers from 1 to {1 << 16}, as in 64,768; got {text[:40]!r}")
    return list(dict.fromkeys(map(int, parts)))


def _dtypes(text: str) -> list[str]:
    parts = [{"bfloat16": "bf16", "float16": "fp16"}.get(part, part) for part in text.split(",")]
    for part in parts:
        if part not in DTYPES:
            raise argparse.ArgumentTypeError(f"there is no {part!r}. There are {', '.join(DTYPES)}")
    return list(dict.fromkeys(parts))


def _gpu(text: str) -> Device:
    try:
        return known_gpu(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], text[-1:]) if text[-1:] in units else (text, "s")
    if not (number.isascii() and number.isdigit() and len(number) < 10 and int(number) > 0):
        raise argparse.ArgumentTypeError(f"must be a time such as 300s, 10m or 1h, got {text[:40]!r}")
    return float(int(number) * units[unit])


def tune(args: argparse.Namespace) -> int:
    """0; 1 where a shape could not be tuned; 130 when interrupted."""
    require(*SHOWING)
    shapes = list(dict.fromkeys(itertools.product(args.dtype, args.hidden, map(bucket, args.batch))))
    if args.dry_run:
        from triton_lstm.tune_report import print_plans

        if args.gpu and args.gpu.backend != "cuda" and "tf32" in args.dtype:
            raise UsageError(f"{args.gpu.name} has no tf32, which is NVIDIA's")
        if args.out or args.again or args.budget < math.inf:
            raise UsageError("--dry-run measures and writes nothing. Leave out --out, --again and --budget")
        print_plans(args.gpu or _device_here(), shapes, args.verbose)
        return 0
    if args.gpu:
        raise UsageError("--gpu is for --dry-run: only the GPU that is here can be measured")
    if not torch.cuda.is_available():
        raise UsageError(
            "no GPU that PyTorch can use was found, and nothing was measured. `triton-lstm tune --dry-run --gpu H200` "
            "shows plans for another machine"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("TRITON_INTERPRET=1 keeps the kernels off the GPU, and nothing was measured. Unset it")
    require("filelock", "triton")
    import filelock

    device = device_for("cuda")
    path = args.out or default_path(torch.cuda.get_device_name(device))
    if not path.name or path.is_dir():
        raise UsageError(f"--out {str(path)!r} is a folder. Name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(f"{path}.tuning.lock", timeout=0):
            return _tune(args, shapes, path, device)
    except filelock.Timeout:
        raise UsageError(f"another tune is filling {path}. Wait for it, or give another file with --out") from None


def default_path(gpu: str) -> Path:
    folder = user_folder()
    if folder is None:
        raise UsageError(f"platformdirs is not installed: name the table with --out, or its folder in {FOLDER}")
    return folder / file_name(gpu)


def _tune(args: argparse.Namespace, shapes: list[Shape], path: Path, device: torch.device) -> int:
    from tqdm import tqdm

    from triton_lstm.kernels import device_facts
    from triton_lstm.perf.failures import DeviceLostError
    from triton_lstm.perf.watchdog import HANG_S, watched
    from triton_lstm.tune_report import print_tuned

    gpu = device_facts(device)
    _write(path, gpu.name)
    table, progress, stopped = read(path), Progress(Path(f"{path}.running")), ""
    remember(gpu.name, *table.plans.values())
    items = [item for shape in shapes for item in _items(shape)]
    wanted = [item for item in items if str(item) not in progress.results and (args.again or not item.known(table))]
    ends = time.monotonic() + args.budget
    try:
        with watched(progress.path, lambda: start_again(args, f"no answer for {HANG_S} s")):
            for item in tqdm(wanted, unit="item", disable=None):
                if time.monotonic() > ends:
                    stopped = "the budget is spent"
                    break
                progress.done(str(item), _measure(args, item, path, device, progress))
    except DeviceLostError as lost:
        start_again(args, f"this process cannot go on with the GPU ({lost})")
    except KeyboardInterrupt:
        stopped = "interrupted"
    except BaseException:  # no config's fault
        progress.stop()
        raise
    failed = {item: why for item in map(str, items) if (why := progress.results.get(item))}
    if stopped:
        progress.stop()
    else:
        progress.end()
    print_tuned(read(path), shapes, gpu)
    for name, why in failed.items():
        print(f"not measured: {name}: {why}")
    print(f"table: {path}")
    if stopped:
        print(f"{stopped}; the same command continues from here")
    return 130 if stopped == "interrupted" else int(bool(failed))


@dataclasses.dataclass(frozen=True)
class Item:
    """A time loop to be tuned or, with no direction, a whole layer to be timed beside PyTorch's path."""

    dtype: str
    H: int
    B: int
    backward: bool | None

    def known(self, table: Table) -> bool:
        if self.backward is not None:
            return self.key in table.plans
        return all((mode, self.dtype, self.H, self.B) in table.layers for mode in ("inference", "training"))

    @property
    def key(self) -> Key:
        return Key(bool(self.backward), self.dtype, self.H, self.B)

    def __str__(self) -> str:
        what = {None: "whole layer", False: "forward", True: "backward"}[self.backward]
        return f"{self.dtype} H={self.H} B={self.B} {what}"


def _items(shape: Shape) -> list[Item]:
    return [Item(*shape, backward) for backward in (False, True, None)]


def _measure(args: argparse.Namespace, item: Item, path: Path, device: torch.device, progress: Progress) -> str | None:
    """Measures an item and writes the table; returns why it could not."""
    from triton.errors import TritonError

    from triton_lstm import tune as tuning
    from triton_lstm.perf.cases import switches
    from triton_lstm.perf.failures import device_still_there, failure
    from triton_lstm.tune_report import print_trials

    gpu = torch.cuda.get_device_name(device)
    refused = progress.begin(str(item))
    if refused:
        return refused
    try:
        with switches(item.dtype):
            if item.backward is None:
                _write(path, gpu, *tuning.layer_times(item.dtype, item.H, item.B, device))
                return None
            trials = tuning.measure(
                item.key, device, begin=lambda plan: progress.begin(f"{item}: {plan}"), again=args.again
            )
        print_trials(str(item), trials, args.verbose)
        found = tuning.best(item.key, trials, tuning.provenance())
        if found is None:
            return trials[0].reason
        remember(gpu, found)
        _write(path, gpu, found)
    except (RuntimeError, MemoryError, ValueError, TritonError) as error:
        device_still_there(device)
        return str(failure(error)["reason"])
    return None


def _write(path: Path, gpu: str, *entries: Any) -> None:
    try:
        update(path, gpu, *entries)
    except TableError as error:
        raise UsageError(f"{path} cannot be added to: {error}. Give another file with --out, or move it away") from None


def start_again(args: argparse.Namespace, why: str) -> NoReturn:
    print(f"{why}; continuing in a fresh one", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "triton_lstm", *args.argv])


def _device_here() -> Device:
    if not torch.cuda.is_available():
        raise UsageError(f"no GPU that PyTorch can use was found. Name one with --gpu: {', '.join(GPUS)}")
    from triton_lstm.kernels import device_facts

    return device_facts(device_for("cuda"))
