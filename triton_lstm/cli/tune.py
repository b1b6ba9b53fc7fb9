"""The command tune of `python -m triton_lstm`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from triton_lstm.planning.devices import GPUS, Device, file_name, known_gpu
from triton_lstm.settings import SHOWING, UsageError, device_for, dtype_name, interpreter_asked_for, require, switches
from triton_lstm.system.terminal import Bar, say
from triton_lstm.tuning.choice import remember
from triton_lstm.tuning.progress import Progress
from triton_lstm.tuning.table_file import DTYPES, Key, Table, TableError, bucket, read, update
from triton_lstm.tuning.tables import FOLDER, user_folder

if TYPE_CHECKING:
    from triton_lstm.cli.tune_report import Shape


def add_commands(commands: Any) -> None:
    """Adds tune to the subparsers of the command line."""
    t = commands.add_parser("tune", help="measure the best config per shape on this GPU; continues where it stopped")
    add_shapes(t)
    t.add_argument(
        "--budget", type=_seconds, default=math.inf, metavar="TIME", help="start nothing new after 300s, 10m"
    )
    t.add_argument(
        "--out", type=Path, metavar="FILE", help="the table (default: this GPU's in the user's cache folder)"
    )
    t.add_argument("--again", action="store_true", help="measure again what the table has")
    t.add_argument("--verbose", action="store_true", help="show every config, and why one was dropped")
    t.add_argument("--dry-run", action="store_true", help="show what is planned and predicted; needs no GPU")
    t.add_argument(
        "--model", action="store_true", help="with --dry-run: also what each kernel's machine code should take"
    )
    t.add_argument("--gpu", type=_gpu, metavar="NAME", help=f"with --dry-run: for another GPU; {', '.join(GPUS)}")
    t.set_defaults(run=tune)


def add_shapes(parser: argparse.ArgumentParser) -> None:
    """Adds the options that select shapes."""
    parser.add_argument(
        "--hidden",
        type=_sizes,
        default=[256, 512, 768, 1024],
        metavar="N[,N]",
        help="hidden units; default: 256,512,768,1024",
    )
    parser.add_argument(
        "--batch",
        type=_sizes,
        default=[16, 64],
        metavar="N[,N]",
        help="rows; measured at the next power of two from 16; default: 16,64",
    )
    parser.add_argument(
        "--dtype",
        type=_dtypes,
        default=["bf16"],
        metavar="NAME[,NAME]",
        help=f"{', '.join(DTYPES)}; tf32 and fp32 are float32 with TF32 allowed or not; default: bf16",
    )


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    return list(dict.fromkeys(itertools.product(args.dtype, args.hidden, map(bucket, args.batch))))


def keys_of(args: argparse.Namespace) -> list[Key]:
    """The keys of all shapes' time loops."""
    return [item.key for shape in shapes_of(args) for item in _items(shape) if item.backward is not None]


def _sizes(text: str) -> list[int]:
    parts = text.split(",")
    if not all(p.isascii() and p.isdigit() and len(p) < 6 and 0 < int(p) <= 1 << 16 for p in parts):
        raise argparse.ArgumentTypeError(f"must be whole numbers from 1 to {1 << 16}, as in 64,768; got {text[:40]!r}")
    return list(dict.fromkeys(map(int, parts)))


def _dtypes(text: str) -> list[str]:
    parts = [dtype_name(part) for part in text.split(",")]
    for part in parts:
        if part == "fp64":
            raise argparse.ArgumentTypeError("no kernel computes in fp64 on a GPU: there is nothing to tune")
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
    shapes = shapes_of(args)
    if args.dry_run:
        from triton_lstm.cli.tune_report import print_plans

        if args.gpu and args.gpu.backend != "cuda" and "tf32" in args.dtype:
            raise UsageError(f"{args.gpu.name} has no tf32, which is NVIDIA's")
        if args.out or args.again or args.budget < math.inf:
            raise UsageError("--dry-run measures and writes nothing. Leave out --out, --again and --budget")
        if args.model:
            require("triton")
        print_plans(args.gpu or _device_here(), shapes, args.verbose, args.model)
        return 0
    if args.model:
        raise UsageError("--model is for --dry-run: it compiles kernels and measures nothing")
    if args.gpu:
        raise UsageError("--gpu is for --dry-run: only the GPU that is here can be measured")
    if not torch.cuda.is_available():
        raise UsageError(
            "no GPU that PyTorch can use was found, and nothing was measured. `triton-lstm tune --dry-run --gpu H200` "
            "shows plans for another machine"
        )
    if interpreter_asked_for():
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
    try:
        folder = user_folder()
    except TableError as error:
        raise UsageError(str(error)) from None
    if folder is None:
        reason = "no cache folder is known, because platformdirs or a home folder is missing"
        raise UsageError(f"{reason}: name the table with --out, or its folder in {FOLDER}")
    return folder / file_name(gpu)


def _tune(args: argparse.Namespace, shapes: list[Shape], path: Path, device: torch.device) -> int:
    from triton_lstm.cli.tune_report import print_tuned
    from triton_lstm.kernels import device_facts
    from triton_lstm.perf.failures import DeviceLostError
    from triton_lstm.perf.warm import compile_all, jobs_of_tune
    from triton_lstm.perf.watchdog import HANG_S, start_again, watched

    gpu = device_facts(device)
    _write(path, gpu.name)
    table, stopped = read(path), ""
    known = _entries(table)
    progress = Progress(Path(f"{path}.running"), known)
    remember(gpu.name, *table.plans.values())
    items = [item for shape in shapes for item in _items(shape)]
    wanted = [i for i in items if str(i) not in progress.results and (args.again or str(i) not in known)]
    if wanted:
        say(f"{len(wanted)} of {len(items)} items to measure, minutes in all; Ctrl-C stops, the same command continues")
    ends = time.monotonic() + args.budget

    def hangs() -> None:
        start_again(args.argv, f"no answer for {HANG_S} s")

    try:
        with watched(progress.path, hangs):
            loops = [item.key for item in wanted if item.backward is not None]
            if len(loops) > 2:
                compile_all(jobs_of_tune(loops))
            for item in Bar(wanted, unit="item"):
                if time.monotonic() > ends:
                    stopped = "the budget is spent"
                    break
                why_not = _measure(args, item, path, device, progress)
                if why_not is None:
                    progress.done(str(item), _entries(read(path)).get(str(item), ""))
                else:
                    progress.failed(str(item), why_not)
    except DeviceLostError as lost:
        start_again(args.argv, f"this process cannot go on with the GPU ({lost})")
    except KeyboardInterrupt:
        stopped = "interrupted"
    except BaseException:  # not the config's fault
        progress.stop()
        raise
    failed = {item: why for item in map(str, items) if (why := progress.results.get(item))}
    if stopped:
        progress.stop()
    else:
        progress.end()
    print_tuned(read(path), shapes, gpu)
    for name, why in failed.items():
        say(f"not measured: {name}: {why}")
    say(f"table: {path}")
    if stopped:
        print(f"{stopped}; the same command continues from here")
    return 130 if stopped == "interrupted" else int(bool(failed))


@dataclasses.dataclass(frozen=True)
class Item:
    """A time loop to tune or, where `backward` is None, a whole layer to time against PyTorch's path."""

    dtype: str
    H: int
    B: int
    backward: bool | None

    @property
    def key(self) -> Key:
        return Key(bool(self.backward), self.dtype, self.H, self.B)

    def __str__(self) -> str:
        what = {None: "whole layer", False: "forward", True: "backward"}[self.backward]
        return f"{self.dtype} H={self.H} B={self.B} {what}"


def _entries(table: Table) -> dict[str, str]:
    """A table's entry for each item, as text."""
    found = {str(Item(key.dtype, key.H, key.B, key.backward)): str(tuned) for key, tuned in table.plans.items()}
    for _, dtype, H, B in table.layers:
        times = [table.layers.get((mode, dtype, H, B)) for mode in ("inference", "training")]
        if all(times):
            found[str(Item(dtype, H, B, None))] = str(times)
    return found


def _items(shape: Shape) -> list[Item]:
    return [Item(*shape, backward) for backward in (False, True, None)]


def _measure(args: argparse.Namespace, item: Item, path: Path, device: torch.device, progress: Progress) -> str | None:
    """Measures an item and adds it to the table; returns the reason if that failed."""
    from triton.errors import TritonError

    from triton_lstm.cli.tune_report import print_trials
    from triton_lstm.perf.failures import device_still_there, failure
    from triton_lstm.perf.layer_times import layer_times
    from triton_lstm.system.machine import provenance
    from triton_lstm.tuning.measure import best, measure

    gpu = torch.cuda.get_device_name(device)
    refused = progress.begin(str(item))
    if refused:
        return refused
    try:
        with switches(item.dtype):
            if item.backward is None:
                _write(path, gpu, *layer_times(item.dtype, item.H, item.B, device))
                return None
            trials = measure(item.key, device, begin=lambda plan: progress.begin(f"{item}: {plan}"), again=args.again)
        print_trials(str(item), trials, args.verbose)
        found = best(item.key, trials, provenance())
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


def _device_here() -> Device:
    if not torch.cuda.is_available():
        raise UsageError(f"no GPU that PyTorch can use was found. Name one with --gpu: {', '.join(GPUS)}")
    from triton_lstm.kernels import device_facts

    return device_facts(device_for("cuda"))
