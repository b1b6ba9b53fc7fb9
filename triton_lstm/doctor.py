"""The command doctor of `python -m triton_lstm`: what is here, whether it works, and what to do about what does not."""

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
from triton_lstm.backend import (
    chosen_backend,
    device_for,
    interpreter_asked_for,
    product_precision,
    release,
    spin_limit,
    wants_tuning,
    why_no_triton,
)
from triton_lstm.table_file import TableError
from triton_lstm.tables import FOLDER, tables_of, user_folder
from triton_lstm.terminal import say

OLDEST_TORCH = (2, 9)


@dataclasses.dataclass(frozen=True)
class Finding:
    """state: "ok", "note" for what only narrows things, "BAD" for what needs a remedy."""

    name: str
    state: Literal["ok", "note", "BAD"]
    text: str
    remedy: str = ""


def add_commands(commands: Any) -> None:
    """Adds doctor to the subparsers of the command line."""
    d = commands.add_parser("doctor", help="check GPU, versions, tables and answers; works without a GPU")
    d.set_defaults(run=doctor)


def doctor(args: argparse.Namespace) -> int:
    """1 if something needs a remedy."""
    bad = 0
    for finding in findings():
        bad += finding.state == "BAD"
        say(f"{finding.state:<5}{finding.name:<20}{finding.text}", indent=" " * 25)
        if finding.remedy:
            say(f"{'':<25}-> {finding.remedy}", indent=" " * 28)
    print(f"{bad} of these need a remedy" if bad else "all is well")
    return int(bad > 0)


def findings() -> Iterator[Finding]:
    """Every finding, in the order of what needs what."""
    device = device_for()  # before triton is imported
    yield Finding("triton_lstm", "ok", f"{triton_lstm.__version__}, Python {platform.python_version()}")
    yield _torch()
    yield _gpu()
    here = _triton()
    yield here
    yield _cudnn()
    said = list(_environment())
    yield from said
    yield from _tables()
    if "BAD" in [here.state, *(finding.state for finding in said)]:
        yield Finding("forward, backward", "note", "not tried", "first mend what is BAD above")
        return
    for name, check in (("one launch", _cooperative), ("forward, backward", _answers)):
        begin = time.monotonic()
        try:
            finding = check(device)
        except Exception as error:
            lines = str(error).strip().splitlines() or ["no message"]
            finding = Finding(name, "BAD", f"{type(error).__name__}: {lines[0]}"[:200], REPORT)
        yield dataclasses.replace(finding, text=f"{finding.text} ({time.monotonic() - begin:.1f} s)")


REPORT = 'backend="torch" or TRITON_LSTM_BACKEND=torch avoids the kernels; please report this with the lines above'


def _torch() -> Finding:
    if release(torch.__version__) < OLDEST_TORCH:
        return Finding("torch", "BAD", f"{torch.__version__} is too old", "install torch 2.9 or newer")
    return Finding("torch", "ok", torch.__version__)


def _gpu() -> Finding:
    from triton_lstm.perf.machine import machine

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} processors"
        driver = machine()["driver"] if not why_no_triton() else ""
        return Finding("GPU", "ok", f"{properties.name}, {memory}{f', driver {driver}' if driver else ''}")
    if torch.version.cuda is None and torch.version.hip is None:
        return Finding(
            "GPU",
            "note",
            "none: this torch is built for the CPU only",
            "if there is one, install the torch that is built for it",
        )
    return Finding("GPU", "note", "torch finds none", "if there is one, look at its driver with nvidia-smi or rocm-smi")


def _triton() -> Finding:
    reason = why_no_triton()
    if reason is None:
        import triton

        return Finding("triton", "ok", triton.__version__)
    remedy = "mend or remove what is there, then install triton 3.5 or newer"
    if reason.endswith("not installed"):
        remedy = "pip install triton"
    text = f"{reason.removeprefix('triton ')}: every call goes to PyTorch's own LSTM"
    return Finding("triton", "BAD" if platform.system() == "Linux" else "note", text, remedy)


def _cudnn() -> Finding:
    if not torch.backends.cudnn.is_available():
        return Finding("cuDNN", "note", "none; PyTorch's own path does without")
    return Finding("cuDNN", "ok", str(torch.backends.cudnn.version()))


def _environment() -> Iterator[Finding]:
    """Every variable that is set, and whether it makes sense."""

    checks: dict[str, Callable[[], Any]] = {
        "TRITON_LSTM_BACKEND": lambda: chosen_backend(None),
        "TRITON_LSTM_AUTOTUNE": lambda: wants_tuning(torch.device("cpu")),
        "TRITON_LSTM_FP32": lambda: product_precision(torch.float32, torch.device("cpu")),
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
    """The folder in TRITON_LSTM_TUNED, as a call and `tune` will have it."""
    named, remedy = f"{FOLDER}={os.environ[FOLDER]}", "name the folder that holds the tables"
    try:
        names = sorted(name for name in os.listdir(user_folder()) if name.endswith(".json"))
    except FileNotFoundError:
        if os.path.islink(os.path.expanduser(os.environ[FOLDER])):
            return Finding("environment", "BAD", f"{named} is a link to what is not there", remedy)
        names = []
    except NotADirectoryError:
        return Finding("environment", "BAD", f"{named} is no folder", remedy)
    except TableError as error:
        return Finding("environment", "BAD", str(error), remedy)
    except OSError as error:
        return Finding("environment", "BAD", f"{named} cannot be read: {error.strerror}", remedy)
    return Finding("environment", "ok", f"{named}: {', '.join(names) or 'no tables yet'}")


def _tables() -> Iterator[Finding]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if gpu is None:
        yield Finding("tuned tables", "note", "looked up by the GPU's name: without one, none")
        return
    known = list(tables_of(gpu))
    for path, found in known:
        if isinstance(found, TableError):
            yield Finding("tuned tables", "BAD", f"{path}: {found}", "move the file away, or run `triton-lstm tune`")
        else:
            yield Finding("tuned tables", "ok", f"{path}: {len(found.plans)} configs, {len(found.layers)} layer times")
    if not known:
        yield Finding("tuned tables", "note", f"none for {gpu}: configs are planned", "run `triton-lstm tune`")
    if not os.environ.get(FOLDER) and user_folder() is None:
        text = "no cache folder is known, for want of platformdirs or of a home: no user's tables"
        yield Finding("tuned tables", "note", text, f"name a folder in {FOLDER}")


def _cooperative(device: torch.device) -> Finding:
    """Whether programs that wait for each other may share a launch."""
    name = "one launch"
    if device.type != "cuda":
        return Finding(name, "note", "a matter of GPUs; nothing to do")
    from triton_lstm.kernels import device_facts
    from triton_lstm.kernels.launch import refuses_cooperation
    from triton_lstm.perf.exchange_loop import ExchangeLoop

    programs = device_facts(device).processors
    loop = ExchangeLoop(programs, 100, "barrier", device, one_launch=True)
    try:
        loop.run()
    except (RuntimeError, AssertionError) as refusal:
        if not refuses_cooperation(refusal):
            raise
        text = f"refused: {str(refusal)[:100]}; every step is launched by itself, which is slow"
        return Finding(name, "BAD", text, "a GPU shared through MPS, MIG or with another process is the usual reason")
    if not loop.complete():
        return Finding(name, "BAD", f"{programs} programs did not see each other's stores", REPORT)
    return Finding(name, "ok", f"{programs} programs wait for each other in one launch")


def _answers(device: torch.device) -> Finding:
    """Outputs and gradients against nn.LSTM in float64, by the rule of tolerance.py."""
    from triton_lstm.backend import why_not_triton
    from triton_lstm.perf.cases import Case, switches
    from triton_lstm.perf.check import Check, draw

    name = "forward, backward"
    gpu = device.type == "cuda"
    reason = why_not_triton(torch.zeros(0, device=device), "auto")
    if reason:
        return Finding(name, "BAD", f"not tried: {reason}", "mend that first")
    cases = [Case("fp32", T=5, B=3, H=20), Case("bf16", T=9, B=17, H=300 if gpu else 33, I=12)]
    worst = 0.0
    for case in cases:
        with switches(case.precision):
            problem = draw(case, device)
            module = triton_lstm.LSTM(**case.module_arguments, backend="triton").to(device, case.dtype)
            module.load_state_dict(problem.twin.state_dict())
            found = Check(problem)(module)
        if found.get("status") == "wrong":
            return Finding(name, "BAD", f"{case.name}: {found['reason']}", REPORT)
        worst = max(worst, found["error_share"])
    how = "on the GPU" if gpu else "in Triton's interpreter"
    return Finding(name, "ok", f"as nn.LSTM {how}: at most {worst:.0%} of the error that is allowed")
