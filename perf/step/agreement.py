"""python -m triton_lstm.perf.step.agreement: whether the cost model orders plans as measured and modelled times do.

It compiles again what it has stored, and what the cost model now takes for cheap, and stores what the model says of
them; with --stored it compiles nothing. With --fit it prints the constants that fit all of them, and how well such
constants order the plans of problems that were left out of a fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd
from tqdm import tqdm

from triton_lstm.perf.step.loops import MODELLED, TimeLoop, model, plans, problems, read_measured, read_modelled, write
from triton_lstm.planning.cost import FITTED, Constants, cost
from triton_lstm.planning.limits import why_not

FEWEST = 5  # loops of a problem that is looked at
FOLDS = 5
MEASURED_COUNTS = 8.0  # in the fit's sum of squares, as much as so many modelled ones
REMAINS = 0.03  # how much a constant stays as it is where no loop depends on it
OUTLIER = 0.3  # from there on an error (of the logarithm, weighted) counts less than its square


def agreement(loops: Sequence[TimeLoop], predicted: Sequence[float] | np.ndarray) -> dict[str, float]:
    """How well predictions order the plans of each problem that has some; nan where none has.

    loops, problems: how many. spearman: the mean of the problems. above_0.9: the share of them with at least so much.
    loss, most: what the plan with the least prediction takes beyond the best one, mean and maximum, as a share of that.
    within_5%: the share of problems where it takes no more. error: of all loops, the RMS of the ratio's logarithm.
    """
    frame = pd.DataFrame({"problem": [loop.problem for loop in loops], "us": [loop.us for loop in loops]})
    frame["predicted"] = list(predicted)
    ranks, losses = [], []
    for _, one in frame.groupby("problem", sort=False):
        if len(one) >= FEWEST:
            ranks.append(one["us"].rank().corr(one["predicted"].rank()))
            losses.append(one.loc[one["predicted"].idxmin(), "us"] / one["us"].min())
    rank, loss = np.array(ranks or [np.nan]), np.array(losses or [np.nan])
    return {
        "loops": len(frame),
        "problems": len(ranks),
        "spearman": rank.mean(),
        "above_0.9": (rank >= 0.9).mean(),
        "loss": loss.mean() - 1,
        "most": loss.max() - 1,
        "within_5%": (loss <= 1.05).mean(),
        "error": float(np.sqrt(np.mean(np.log(frame["predicted"] / frame["us"]) ** 2))),
    }


def table(measured: Sequence[TimeLoop], modelled: Sequence[TimeLoop], constants: Constants = FITTED) -> pd.DataFrame:
    """`agreement` for measured and modelled loops that a plan may choose: all of them, and modelled ones by GPU."""
    groups = {"measured": _allowed(measured), "modelled": _allowed(modelled)}
    for loop in groups["modelled"]:
        groups.setdefault(loop.problem.device.name, []).append(loop)
    return pd.DataFrame({name: agreement(group, _us(group, constants)) for name, group in groups.items()}).T


def _allowed(loops: Sequence[TimeLoop]) -> list[TimeLoop]:
    return [loop for loop in loops if why_not(loop.problem, loop.plan) is None]


def _us(loops: Sequence[TimeLoop], constants: Constants) -> np.ndarray:
    return np.array([cost(loop.problem, loop.plan, constants).us for loop in loops])


def fit(measured: Sequence[TimeLoop], modelled: Sequence[TimeLoop]) -> Constants:
    """The constants with the least error of the logarithm of all times, of kernels that do not spill."""
    from scipy.optimize import least_squares

    real = _allowed(measured)  # of the others it is not known whether they spill
    loops = [*real, *(loop for loop in modelled if not loop.local)]
    weights = np.sqrt([MEASURED_COUNTS if k < len(real) else 1.0 for k in range(len(loops))])
    times, start = np.log([loop.us for loop in loops]), np.log(dataclasses.astuple(FITTED))

    def errors(logarithms: np.ndarray) -> np.ndarray:
        predicted = _us(loops, Constants(*np.exp(logarithms).tolist()))
        return np.concatenate([weights * (np.log(predicted) - times), REMAINS * (logarithms - start)])

    found = least_squares(errors, start, loss="soft_l1", f_scale=OUTLIER)
    return Constants(*(float(f"{value:.3g}") for value in np.exp(found.x)))


def held_out(measured: Sequence[TimeLoop], modelled: Sequence[TimeLoop]) -> pd.DataFrame:
    """`agreement` where each problem is predicted by a fit to problems of other folds."""
    folds = {
        problem: k % FOLDS for k, problem in enumerate(dict.fromkeys(one.problem for one in (*measured, *modelled)))
    }
    predicted: dict[str, list[tuple[TimeLoop, float]]] = {"measured": [], "modelled": []}
    for k in range(FOLDS):
        groups = {"measured": measured, "modelled": modelled}
        constants = fit(*([loop for loop in group if folds[loop.problem] != k] for group in groups.values()))
        for name, group in groups.items():
            left_out = _allowed([loop for loop in group if folds[loop.problem] == k])
            predicted[name] += zip(left_out, _us(left_out, constants), strict=True)
    return pd.DataFrame({name: agreement(*zip(*pairs, strict=True)) for name, pairs in predicted.items()}).T


def _model_all(stored: Sequence[TimeLoop]) -> None:
    every = dict.fromkeys((loop.problem, loop.plan) for loop in stored)
    every |= dict.fromkeys((problem, plan) for problem in problems() for plan in plans(problem))
    try:
        with ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
            write(MODELLED, tqdm(pool.map(model, every), total=len(every), unit="kernel", disable=None))
    except KeyboardInterrupt:
        print(f"interrupted; {MODELLED} is as it was", file=sys.stderr)
        os._exit(130)  # without waiting for the kernels that are being compiled


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m triton_lstm.perf.step.agreement", description=__doc__)
    parser.add_argument("--stored", action="store_true", help="compares with the modelled times of an earlier run")
    parser.add_argument("--fit", action="store_true", help="prints fitted constants; nothing is changed")
    args = parser.parse_args()
    if args.fit and importlib.util.find_spec("scipy") is None:
        parser.error("--fit needs scipy: pip install scipy")
    try:
        if not args.stored:
            _model_all(read_modelled())
        measured, modelled = read_measured(), read_modelled()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("How the cost model orders the plans of a problem:")
    print(table(measured, modelled).round(2).to_string())
    if args.fit:
        print("\nFitted to all of them:", fit(measured, modelled), "\n\nEach problem left out of its fit:", sep="\n")
        print(held_out(measured, modelled).round(2).to_string())


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before a kernel is imported: interpreted ones have no machine code
    main()
