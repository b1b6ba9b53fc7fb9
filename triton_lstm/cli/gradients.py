"""The command gradients of `python -m triton_lstm`."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from triton_lstm.cli.train import checked_backend, command_device, positive, seed_number
from triton_lstm.gradients import shapes as gradient_shapes
from triton_lstm.gradients.record import record_gradients
from triton_lstm.gradients.results import Gradients
from triton_lstm.module import LSTM
from triton_lstm.settings import SHOWING, UsageError, require
from triton_lstm.training import data
from triton_lstm.training.checkpoint import load_checkpoint, newest_checkpoint
from triton_lstm.training.config import SMALL, Config
from triton_lstm.training.model import build

SEQ_LEN = 100
OTHER = "Give another --checkpoint"


def add_commands(commands: Any) -> None:
    """Adds gradients to the subparsers of the command line."""
    g = commands.add_parser("gradients", help="show the gradients inside an LSTM: shapes, how far back they reach")
    what = "saved by `train`; the newest one if it is a folder (default: a random model)"
    g.add_argument("--checkpoint", type=Path, metavar="FILE", help=what)
    g.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="default: the text of the checkpoint, or the sources of Python's standard library",
    )
    g.add_argument("--seq-len", type=positive, default=SEQ_LEN, metavar="BYTES", help=f"steps (default: {SEQ_LEN})")
    g.add_argument("--loss", choices=["last", "every"], default="last", help="loss of which bytes (default: last)")
    g.add_argument("--plot", type=Path, metavar="FILE", help="save a figure there, .png or .svg")
    g.add_argument("--seed", type=seed_number, help="seed of the batch and of a random model (default: 0)")
    g.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")
    g.set_defaults(run=_gradients)


def _gradients(args: argparse.Namespace) -> int:
    device = command_device(args.device)
    require(*SHOWING)
    if args.plot:
        _check_plot(args.plot)
    config, content = _model_config(args)
    interpreted = not checked_backend(torch.float32, device) and device.type == "cpu"
    text = _text(args, config, content)
    if interpreted:
        print("this takes a minute or more in Triton's interpreter (no GPU)", flush=True)
    _print_shapes(device)
    print(
        "output.grad is None unless output.retain_grad() was called before backward(),\n"
        "since the output is not a leaf. record_gradients provides it: grads.output is\n"
        "the direct gradient of the output, zero at steps that the loss does not use;\n"
        "grads.hidden is the total, including the gradient through time. h0: layer 0.\n"
    )
    grads = _record(config, content, text, device, last=args.loss == "last")
    source = f"the model of {args.checkpoint}" if args.checkpoint else "a random model"
    of = "the last byte" if args.loss == "last" else "every byte"
    which = "held-out text" if args.checkpoint and not args.text else "text"
    print(f"{source}, {config.batch} sequences of {config.seq_len} bytes of {which}, loss of {of}:")
    print(grads.summary())
    if args.plot:
        grads.plot(args.plot)
        print(f"figure: {args.plot}")
    return 0


def _check_plot(path: Path) -> None:
    """Raises UsageError unless a figure can be saved there."""
    require("matplotlib")
    if path.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"cannot save {path}: the suffix must be .png or .svg. Choose another --plot")
    if path.exists() and not path.is_file():
        raise UsageError(f"cannot save {path}: it is not a regular file. Choose another --plot")
    if not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"cannot save {path}: its folder does not exist or is not writable. Choose another --plot")


def _model_config(args: argparse.Namespace) -> tuple[Config, dict[str, Any] | None]:
    """The configuration of the checkpoint or of a random model, with this command's seq_len, and the checkpoint."""
    if args.checkpoint:
        args.checkpoint = newest_checkpoint(args.checkpoint)
    config, content = load_checkpoint(args.checkpoint, OTHER) if args.checkpoint else (SMALL, None)
    given = {"seq_len": args.seq_len} | ({} if args.seed is None else {"seed": args.seed})
    return dataclasses.replace(config, **given), content


def _text(args: argparse.Namespace, config: Config, content: dict[str, Any] | None) -> torch.Tensor:
    """The text of --text, else the checkpoint's own, else the default one."""
    if args.text or not content:
        return data.read_text(args.text, config.seq_len)
    files = content["text"]
    try:
        text = data.read_text(files, content["config"]["seq_len"])
    except UsageError as error:
        problem = f"the text that {args.checkpoint} was trained on is not available"
        raise UsageError(f"{problem}: {error}, with --text") from None
    if data.digest(text) != content["digest"]:
        what = ", ".join(files) if files else "the sources of Python's standard library"
        raise UsageError(f"{what}: no longer the text that {args.checkpoint} was trained on. Give one with --text")
    return data.read_text(files, config.seq_len)


def _print_shapes(device: torch.device) -> None:
    """Prints one column per case, one row per gradient."""
    import pandas as pd

    from triton_lstm.system.terminal import print_table

    columns = gradient_shapes.rows(device)
    rows = [{"": name, **{column["case"]: column[name] for column in columns}} for name in columns[0] if name != "case"]
    print_table(pd.DataFrame(rows))


def _record(
    config: Config, content: dict[str, Any] | None, text: torch.Tensor, device: torch.device, *, last: bool
) -> Gradients:
    model = build(config, device, LSTM)
    if content:
        try:
            model.load_state_dict(content["model"])
        except Exception:
            raise UsageError(f"the checkpoint's weights do not match its sizes. {OTHER}") from None
    _, held_out = data.split(text)
    tokens = data.window(held_out, config, 0, device)
    with record_gradients(model) as grads:
        logits, _ = model(tokens[:-1])
        logits, targets = (logits[-1:], tokens[-1:]) if last else (logits, tokens[1:])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    return grads
