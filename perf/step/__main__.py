"""python -m triton_lstm.perf.step: compiles planned kernels for any NVIDIA GPU and prints what a step should cost."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from triton_lstm.perf.step.constants import FITTED, H100, Constants
from triton_lstm.perf.step.machine_code import disassemble
from triton_lstm.perf.step.model import Step, model_step
from triton_lstm.perf.step.timeline import Loop
from triton_lstm.planning.cost import cost
from triton_lstm.planning.devices import known_gpu
from triton_lstm.planning.limits import why_impossible
from triton_lstm.planning.plan import Plan
from triton_lstm.planning.problem import Problem
from triton_lstm.planning.space import make_plan, with_groups
from triton_lstm.settings import UsageError

WHAT = (
    "what to model: GPU:DTYPE:H:B:DIRECTION, such as H100:bf16:768:16:forward, for the planned kernel, with fields of "
    "the plan to change, as in H100:bf16:768:16:forward:block_h=16,warps=8; or a cubin, with its loop's fields behind "
    "a colon, as in kernel.cubin:warps=4,programs=96,chunks=3"
)


def main(argv: list[str] | None = None) -> int:
    """0; 2 where something cannot be modelled."""
    parser = argparse.ArgumentParser(prog="python -m triton_lstm.perf.step", description=__doc__)
    parser.add_argument("what", nargs="*", help=WHAT)
    parser.add_argument("-v", "--verbose", action="store_true", help="phases of a step, and what warps wait for")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another constant: port=32")
    parser.add_argument("--fitted", action="store_true", help="constants fitted to this project's measurements")
    parser.add_argument("--measured", metavar="GPU", help="compares the model with this GPU's tuned table and results")
    args = parser.parse_args(argv)
    if not args.what and not args.measured:
        parser.error("say what to model, or --measured GPU")
    failed = False
    try:
        constants = _changed(FITTED if args.fitted else H100, ",".join(args.set))
    except UsageError as error:
        parser.error(str(error))
    for what in args.what:
        try:
            title, step = _modelled(what, constants)
        except (UsageError, ValueError, OSError) as error:
            print(f"{what}: {error}", file=sys.stderr)
            failed = True
            continue
        print(f"{title}\n  modelled: {step}")
        if args.verbose:
            _print_phases(step)
    if args.measured:
        try:
            _print_measured(args.measured, constants)
        except ValueError as error:
            parser.error(str(error))
    return 2 * failed


def _modelled(what: str, constants: Constants) -> tuple[str, Step]:
    if ".cubin" in what:
        path, _, changes = what.partition(".cubin")
        loop = _changed(Loop(warps=4), changes.removeprefix(":"))
        return what, model_step(disassemble(Path(f"{path}.cubin").read_bytes())[2], loop, constants)
    problem, plan = _planned(what)
    from triton_lstm.perf.step.compiled import modelled

    return f"{what}: {plan}\n  predicted: {cost(problem, plan)}", modelled(problem, plan, constants)[0]


def _planned(what: str) -> tuple[Problem, Plan]:
    gpu, dtype, H, B, direction, *changes = [*what.split(":"), *[""] * 4][:6]
    try:
        problem = Problem(known_gpu(gpu), dtype, int(B), int(H), {"forward": False, "backward": True}[direction])
        plan = make_plan(problem)
    except (ValueError, KeyError) as error:
        raise UsageError(f"must be like H100:bf16:768:16:forward: {error}") from None
    if changes[0]:
        plan = _changed(plan, changes[0])
        for name in ("block_b", "block_h", "block_k", "slices", "warps", "splits"):
            if (size := getattr(plan, name)) < 1 or size & (size - 1):
                raise UsageError(f"{name} must be a power of 2, got {size}")
        if plan.block_h < plan.splits:
            raise UsageError(f"a program must own units: block_h={plan.block_h}, splits={plan.splits}")
        plan = with_groups(problem, plan)
    if reason := why_impossible(problem, plan):
        raise UsageError(f"{plan} cannot run: {reason}")
    return problem, plan


def _changed(data: Any, changes: str) -> Any:
    """A dataclass with other values, as in "warps=8,slices=8"."""
    found: dict[str, Any] = {}
    old: Any
    for change in filter(None, changes.split(",")):
        name, _, text = change.partition("=")
        old = getattr(data, name, None)
        if name not in {field.name for field in dataclasses.fields(data)}:
            names = ", ".join(field.name for field in dataclasses.fields(data))
            raise UsageError(f"there is no {name!r}. There are {names}")
        try:
            found[name] = {"True": True, "False": False}[text] if isinstance(old, bool) else type(old)(text)
        except (ValueError, KeyError):
            raise UsageError(f"{name} must be a {type(old).__name__}, got {text!r}") from None
    return dataclasses.replace(data, **found)


def _print_measured(gpu: str, constants: Constants) -> None:
    from triton_lstm.perf.step.measured import compare

    for name, measured, modelled in compare(known_gpu(gpu), constants):
        print(f"{name:64s} measured {measured:6.2f} us, modelled {modelled:6.2f}, {modelled / measured:.2f} of it")


def _print_phases(step: Step) -> None:
    print(f"  {step.instructions} instructions, {step.waiting:.0f} cycles; with every row there {step.cycles:.0f}:")
    for phase, reasons in step.phases.items():
        longest = sorted(reasons.items(), key=lambda item: -item[1])
        parts = "  ".join(f"{why} {n:.0f}" for why, n in longest if n >= 1)
        print(f"    {phase:18s}{sum(reasons.values()):7.0f}  {parts}")


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before a kernel is imported: interpreted ones have no machine code
    sys.exit(main())
