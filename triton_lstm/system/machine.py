"""The provenance of a measurement: everything it depends on besides the case."""

from __future__ import annotations

import datetime
import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from triton_lstm.system.version import __version__

NO_GPU = "no GPU: Triton's interpreter vs. PyTorch's CPU LSTM"
PACKAGE = Path(__file__).resolve().parent.parent
GENERATED = "_version.py"  # by the build, with the commit
PRESENTATION = {  # files that cannot change a measurement
    "perf/summary.py",
    "perf/report.py",
    "perf/plots.py",
    "perf/diff.py",
    "system/terminal.py",
}


def machine() -> dict[str, Any]:
    """The provenance columns of a row: gpu, driver, torch, triton, cudnn, commit, sources."""
    import triton

    gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if gpu else NO_GPU,
        "driver": _nvidia_smi("driver_version") or "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str((torch.backends.cudnn.version() if gpu else None) or ""),
        "commit": commit(),
        "sources": hash_of(PACKAGE),
    }


def clock_mhz() -> float:
    """The current SM clock; NaN if nvidia-smi does not report it."""
    text = _nvidia_smi("clocks.sm")
    return float(text) if text and text.isdigit() else float("nan")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _nvidia_smi(field: str) -> str | None:
    if not torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return None
    lines = (_output(["nvidia-smi", f"--query-gpu={field},uuid", "--format=csv,noheader,nounits"]) or "").splitlines()
    uuid = str(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", "unknown"))
    mine = [line for line in lines if uuid in line] or lines
    return mine[0].split(",")[0].strip() if len(mine) == 1 else None


def commit() -> str:
    """`git describe` of the checkout that contains this package; without one the version of the package."""
    top = PACKAGE.parent
    if not (top / ".git").exists():
        return __version__
    return _output(["git", "-C", str(top), "describe", "--tags", "--always", "--dirty"]) or __version__


def hash_of(package: Path) -> str:
    """A short hash of all sources that affect a measurement, which also covers uncommitted changes."""
    digest = hashlib.sha256()
    for name, path in sorted(sources(package).items()):
        digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def sources(package: Path) -> dict[str, Path]:
    """The source files that affect measurements, by their path inside the package."""
    linked = [package / "kernels", package / "perf"]  # links in a checkout, which rglob does not follow
    found = {path for folder in (package, *linked) for path in folder.rglob("*.py")}
    others = {GENERATED, *PRESENTATION}
    return {name: path for path in found if (name := path.relative_to(package).as_posix()) not in others}


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def provenance() -> str:
    """The versions and the date (UTC) of a measurement, for tuned tables."""
    facts = machine()
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "cudnn", "driver") if facts[name])
    return f"{versions}, {now()[:10]}"
