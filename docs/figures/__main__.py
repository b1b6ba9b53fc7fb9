"""Writes every picture of the pages to docs/images, or to a folder that is given."""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported: pictures are the same on every machine
os.environ["TRITON_LSTM_TUNED"] = os.devnull  # and do not depend on somebody's own tables

import badges
import evidence
import gradients
import loops
import plans
import style

FIGURES = (
    gradients.gradient_flow,
    gradients.gradient_norms,
    loops.time_loop,
    loops.exchange,
    loops.split_sums,
    plans.plan_partition,
    plans.cost_terms,
    plans.cost_scatter,
    evidence.evidence,
)


def main(folder: Path) -> None:
    for draw in FIGURES:
        style.save(draw(), folder / f"{draw.__name__}.svg")
    for name, badge in badges.badges().items():
        (folder / f"{name}.svg").write_text(badge.badge_svg_text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1] / "images")
