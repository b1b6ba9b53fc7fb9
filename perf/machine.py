"""What a number depends on besides the case.

`python -m triton_lstm.perf.machine [FOLDER]` makes the folder of a campaign's results and prints it; with --table it
prints where a tuned table of this GPU is shipped. 2 without a GPU.
"""

from __future__ import annotations

import datetime
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import triton_lstm
from triton_lstm.table_file import file_name
from triton_lstm.tables import SHIPPED

NO_GPU = "no GPU: Triton's interpreter beside PyTorch's CPU LSTM"
MEASURING_NOTHING = {"summary.py", "report.py", "plots.py", "diff.py", "terminal.py"}  # these only show


def machine() -> dict[str, Any]:
    """The columns that say where a row is from: gpu, driver, torch, triton, cudnn, commit, sources."""
    import triton

    gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if gpu else NO_GPU,
        "driver": _nvidia_smi("driver_version") or "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str((torch.backends.cudnn.version() if gpu else None) or ""),
        "commit": _commit(),
        "sources": _sources(),
    }


def clock_mhz() -> float:
    """The streaming multiprocessors' clock just now; NaN where nvidia-smi cannot tell."""
    text = _nvidia_smi("clocks.sm")
    return float(text) if text and text.isdigit() else float("nan")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def results_folder() -> Path:
    """perf/results/<gpu> below the current folder, made of the GPU's name."""
    return Path("perf", "results", Path(file_name(torch.cuda.get_device_name())).stem)


def _nvidia_smi(field: str) -> str | None:
    if not torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return None
    lines = (_output(["nvidia-smi", f"--query-gpu={field},uuid", "--format=csv,noheader,nounits"]) or "").splitlines()
    uuid = str(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", "unknown"))
    mine = [line for line in lines if uuid in line] or lines
    return mine[0].split(",")[0].strip() if len(mine) == 1 else None


def _commit() -> str:
    """`git describe` of the checkout that this package runs from; "unknown" without one."""
    top = Path(__file__).resolve().parent.parent
    if not (top / ".git").exists():
        return "unknown"
    return _output(["git", "-C", str(top), "describe", "--always", "--dirty"]) or "unknown"


def _sources() -> str:
    """A short hash of all that is measured and measures, which also tells apart what no commit does."""
    digest = hashlib.sha256()
    package = Path(triton_lstm.__file__).parent
    for folder in (package, package / "kernels", package / "perf"):
        for path in sorted(set(folder.glob("*.py")) - {folder / name for name in MEASURING_NOTHING}):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("no GPU that PyTorch can use was found; nothing was measured.", file=sys.stderr)
        sys.exit(2)
    if sys.argv[1:] == ["--table"]:
        print(SHIPPED / file_name(torch.cuda.get_device_name()))
        sys.exit()
    folder = Path(*sys.argv[1:]) if sys.argv[1:] else results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    print(folder)
