"""Writes every picture of the pages to docs/images, or to a folder that is given."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is imported: pictures are the same on every machine

import gradients
import style

FIGURES = {"gradient_flow": gradients.gradient_flow, "gradient_norms": gradients.gradient_norms}


def main(folder: Path, suffix: str = ".svg") -> None:
    for name, draw in FIGURES.items():
        style.save(draw(), folder / f"{name}{suffix}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1] / "images", *sys.argv[2:])
