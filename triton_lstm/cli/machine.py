"""`python -m triton_lstm.cli.machine [FOLDER]` creates and prints the results folder of a `make gpu` run.

With --table it prints the path of the shipped tuned table of this GPU. Exit status 2 without a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from triton_lstm.perf.store import results_folder
from triton_lstm.planning.devices import file_name
from triton_lstm.tuning.tables import SHIPPED


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("PyTorch found no usable GPU; nothing was measured.", file=sys.stderr)
        return 2
    if arguments == ["--table"]:
        print(SHIPPED / file_name(torch.cuda.get_device_name()))
        return 0
    folder = Path(*arguments) if arguments else results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
