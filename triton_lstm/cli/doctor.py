"""The command doctor of `python -m triton_lstm`: checks the installation, and says what to do about problems."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

import triton_lstm
from triton_lstm.settings import (
    autotune_setting,
    chosen_backend,
    device_for,
    fp32_setting,
    interpreter_asked_for,
    spin_limit,
    switches,
)
from triton_lstm.system.installed import release, why_no_triton
from triton_lstm.system.machine import commit, machine
from triton_lstm.system.terminal import say
from triton_lstm.system.version import __version__
from triton_lstm.tuning.table_file import TableError
from triton_lstm.tuning.tables import FOLDER, tables_of, user_folder

OLDEST_TORCH = (2, 9)


@dataclasses.dataclass(frozen=True)
class Finding:
    """state: "ok", "note" for a limitation, "BAD" for a problem that needs a remedy."""

    name: str
    state: Literal["ok", "note", "BAD"]
    text: str
    remedy: str = ""


def add_commands(commands: Any) -> None:
    """Adds doctor to the subparsers of the command line."""
    d = commands.add_parser("doctor", help="check GPU, versions, tables and results; works without a GPU")
    d.set_defaults(run=doctor)


def doctor(args: argparse.Namespace) -> int:
    """Exit status 1 if something needs a remedy."""
    bad = 0
    for finding in findings():
        bad += finding.state == "BAD"
        say(f"{finding.state:<5}{finding.name:<20}{finding.text}", indent=" " * 25)
        if finding.remedy:
            say(f"{'':<25}-> {finding.remedy}", indent=" " * 28)
    print(f"{bad} problem{'s' * (bad > 1)} found" if bad else "no problems found")
    return int(bad > 0)


def findings() -> Iterator[Finding]:
    """All findings, those on which others depend first."""
    device = device_for()  # before triton is imported
    yield Finding("triton_lstm", "ok", _version())
    yield _torch()
    yield _gpu()
    triton = _triton()
    yield triton
    yield _cudnn()
    environment = list(_environment())
    yield from environment
    yield from _tables()
    if "BAD" in [triton.state, *(finding.state for finding in environment)]:
        yield Finding("forward, backward", "note", "not run", "first fix the entries marked BAD above")
        return
    for name, check in (("one launch", _cooperative), ("forward, backward", _results)):
        begin = time.monotonic()
        try:
            finding = check(device)
        except Exception as error:
            lines = str(error).strip().splitlines() or ["no message"]
            finding = Finding(name, "BAD", f"{type(error).__name__}: {lines[0]}"[:200], REPORT)
        yield dataclasses.replace(finding, text=f"{finding.text} ({time.monotonic() - begin:.1f} s)")


REPORT = 'backend="torch" or TRITON_LSTM_BACKEND=torch avoids the kernels; please report this with the lines above'


def _version() -> str:
    of = commit()
    return f"{__version__}, {f'commit {of}, ' * (of != __version__)}Python {platform.python_version()}"


def _torch() -> Finding:
    if release(torch.__version__) < OLDEST_TORCH:
        return Finding("torch", "BAD", f"{torch.__version__} is too old", "install torch 2.9 or newer")
    return Finding("torch", "ok", torch.__version__)


def _gpu() -> Finding:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} processors"
        driver = machine()["driver"] if not why_no_triton() else ""
        return Finding("GPU", "ok", f"{properties.name}, {memory}{f', driver {driver}' if driver else ''}")
    if torch.version.cuda is None and torch.version.hip is None:
        return Finding(
            "GPU",
            "note",
            "none: this is a CPU-only build of torch",
            "if there is a GPU, install the build of torch for it",
        )
    return Finding("GPU", "note", "torch finds none", "if there is one, check its driver with nvidia-smi or rocm-smi")


def _triton() -> Finding:
    reason = why_no_triton()
    if reason is None:
        import triton

        return Finding("triton", "ok", triton.__version__)
    remedy = "fix or remove the installed package, then install triton 3.5 or newer"
    if reason.endswith("not installed"):
        remedy = "pip install triton"
    text = f"{reason.removeprefix('triton ')}: every call goes to PyTorch's own LSTM"
    return Finding("triton", "BAD" if platform.system() == "Linux" else "note", text, remedy)


def _cudnn() -> Finding:
    if not torch.backends.cudnn.is_available():
        return Finding("cuDNN", "note", "not available; PyTorch's own path works without it")
    return Finding("cuDNN", "ok", str(torch.backends.cudnn.version()))


def _environment() -> Iterator[Finding]:
    """Every variable that is set, and whether its value is valid."""

    checks: dict[str, Callable[[], Any]] = {
        "TRITON_LSTM_BACKEND": lambda: chosen_backend(None),
        "TRITON_LSTM_AUTOTUNE": autotune_setting,
        "TRITON_LSTM_FP32": fp32_setting,
        "TRITON_LSTM_SPIN_LIMIT": spin_limit,
    }
    for name, check in checks.items():
        if name in os.environ:
            try:
                check()
                yield Finding("environment", "ok", f"{name}={os.environ[name]}")
            except ValueError as error:
                yield Finding("environment", "BAD", str(error), f"unset {name}")
    if os.environ.get(FOLDER):
        yield _named_folder()
    if interpreter_asked_for() and torch.cuda.is_available():
        value = os.environ["TRITON_INTERPRET"]
        text = f"TRITON_INTERPRET={value}: the kernels run in Triton's interpreter, not on the GPU"
        yield Finding("environment", "BAD", text, "unset TRITON_INTERPRET")


def _named_folder() -> Finding:
    """The folder in TRITON_LSTM_TUNED, as calls and `tune` use it."""
    named, remedy = f"{FOLDER}={os.environ[FOLDER]}", "set it to the folder with the tables"
    try:
        names = sorted(name for name in os.listdir(user_folder()) if name.endswith(".json"))
    except FileNotFoundError:
        if os.path.islink(os.path.expanduser(os.environ[FOLDER])):
            return Finding("environment", "BAD", f"{named} is a broken symbolic link", remedy)
        names = []
    except NotADirectoryError:
        return Finding("environment", "BAD", f"{named} is not a folder", remedy)
    except TableError as error:
        return Finding("environment", "BAD", str(error), remedy)
    except OSError as error:
        return Finding("environment", "BAD", f"{named} cannot be read: {error.strerror}", remedy)
    return Finding("environment", "ok", f"{named}: {', '.join(names) or 'no tables yet'}")


def _tables() -> Iterator[Finding]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if gpu is None:
        yield Finding("tuned tables", "note", "none: they are looked up by the name of the GPU")
        return
    known = list(tables_of(gpu))
    for path, found in known:
        if isinstance(found, TableError):
            yield Finding("tuned tables", "BAD", f"{path}: {found}", "remove the file, or run `triton-lstm tune`")
        else:
            yield Finding("tuned tables", "ok", f"{path}: {len(found.plans)} configs, {len(found.layers)} layer times")
    if not known:
        yield Finding("tuned tables", "note", f"none for {gpu}: configs are planned", "run `triton-lstm tune`")
    if not os.environ.get(FOLDER) and user_folder() is None:
        text = "no cache folder is known, since platformdirs or a home directory is missing: no user tables"
        yield Finding("tuned tables", "note", text, f"set {FOLDER} to a folder")


def _cooperative(device: torch.device) -> Finding:
    """Whether programs that wait for each other can run in one launch."""
    name = "one launch"
    if device.type != "cuda":
        return Finding(name, "note", "applies to GPUs only")
    from triton_lstm.kernels import device_facts
    from triton_lstm.kernels.launch import refuses_cooperation
    from triton_lstm.perf.exchange_loop import ExchangeLoop

    programs = device_facts(device).processors
    loop = ExchangeLoop(programs, 100, "barrier", device, one_launch=True, limit=1 << 20)
    try:
        loop.run()
    except (RuntimeError, AssertionError) as refusal:
        if not refuses_cooperation(refusal):
            raise
        text = f"refused: {str(refusal)[:100]}; every step gets a launch of its own, which is slow"
        return Finding(name, "BAD", text, "the usual reason is a GPU shared through MPS, MIG or with another process")
    if not loop.complete():
        return Finding(name, "BAD", f"{programs} programs did not see each other's stores", REPORT)
    return Finding(name, "ok", f"{programs} programs wait for each other in one launch")


def _results(device: torch.device) -> Finding:
    """Outputs and gradients against nn.LSTM in float64, by the rule of tolerance.py."""
    from triton_lstm.dispatch import why_torch
    from triton_lstm.perf.cases import Case
    from triton_lstm.perf.check import Check, make_problem

    name = "forward, backward"
    gpu = device.type == "cuda"
    reason = why_torch(torch.float32, device, "auto")
    if reason:
        return Finding(name, "BAD", f"not run: {reason}", "fix that first")
    cases = [Case("fp32", T=5, B=3, H=20), Case("bf16", T=9, B=17, H=300 if gpu else 33, I=12)]
    worst = 0.0
    for case in cases:
        with switches(case.precision):
            problem = make_problem(case, device)
            module = triton_lstm.LSTM(**case.module_arguments, backend="triton").to(device, case.dtype)
            module.load_state_dict(problem.twin.state_dict())
            found = Check(problem)(module)
        if found.get("status") == "wrong":
            return Finding(name, "BAD", f"{case.name}: {found['reason']}", REPORT)
        worst = max(worst, found["error_share"])
    how = "on the GPU" if gpu else "in Triton's interpreter"
    return Finding(name, "ok", f"agrees with nn.LSTM {how}: at most {worst:.0%} of the allowed error")
