"""The command gradients of `python -m triton_lstm`."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from triton_lstm import gradient_shapes, train
from triton_lstm.checkpoint import load_checkpoint, newest_checkpoint
from triton_lstm.commands import checked_backend, command_device, positive, seed_number
from triton_lstm.config import SHOWING, SMALL, Config, UsageError, require
from triton_lstm.gradients import Gradients, record_gradients
from triton_lstm.module import LSTM

SEQ_LEN = 100
OTHER = "Name another --checkpoint"


def add_commands(commands: Any) -> None:
    """Adds gradients to the subparsers of the command line."""
    g = commands.add_parser("gradients", help="the gradients inside an LSTM: their shapes, how far back they reach")
    what = "what `train` saved; of a folder, the newest (default: a random model)"
    g.add_argument("--checkpoint", type=Path, metavar="FILE", help=what)
    g.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="default: what the checkpoint was trained on, or the sources of Python's own standard library",
    )
    g.add_argument("--seq-len", type=positive, default=SEQ_LEN, metavar="BYTES", help=f"steps (default: {SEQ_LEN})")
    g.add_argument("--loss", choices=["last", "every"], default="last", help="of which bytes (default: the last one)")
    g.add_argument("--plot", type=Path, metavar="FILE", help="save a picture there, .png or .svg")
    g.add_argument("--seed", type=seed_number, help="of the batch and of a random model (default: 0)")
    g.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    g.set_defaults(run=_gradients)


def _gradients(args: argparse.Namespace) -> int:
    where = command_device(args.device)
    require(*SHOWING)
    if args.plot:
        _check_picture(args.plot)
    config, content = _model_config(args)
    interpreted = not checked_backend(torch.float32, where) and where.type == "cpu"
    text = _text(args, config, content)
    if interpreted:
        print("in Triton's interpreter (no GPU) this takes about a minute or more", flush=True)
    _print_shapes(where)
    print(
        "output.grad is None unless output.retain_grad() was called before backward:\n"
        "the output is not a leaf. record_gradients has it: grads.output is the loss's\n"
        "own gradient of the output, zero wherever the loss does not look; grads.hidden\n"
        "is the total, with what comes back through time. h0 is that of layer 0.\n"
    )
    grads = _record(config, content, text, where, last=args.loss == "last")
    source = f"the model of {args.checkpoint}" if args.checkpoint else "a random model"
    looks = "the last byte" if args.loss == "last" else "every byte"
    words = "held-out text" if args.checkpoint and not args.text else "text"
    print(f"{source}, {config.batch} sequences of {config.seq_len} bytes of {words}, the loss of {looks}:")
    print(grads.summary())
    if args.plot:
        grads.plot(args.plot)
        print(f"picture: {args.plot}")
    return 0


def _check_picture(path: Path) -> None:
    """Raises UsageError unless a picture can be saved there later on."""
    require("matplotlib")
    if path.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"cannot save {path}: a picture is .png or .svg. Name another --plot")
    if path.exists() and not path.is_file():
        raise UsageError(f"cannot save {path}: it is not a regular file. Name another --plot")
    if not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"cannot save {path}: its folder is not there or cannot be written to. Name another --plot")


def _model_config(args: argparse.Namespace) -> tuple[Config, dict[str, Any] | None]:
    """The configuration of the checkpoint or of a random model, with this command's length, and the checkpoint."""
    if args.checkpoint:
        args.checkpoint = newest_checkpoint(args.checkpoint)
    config, content = load_checkpoint(args.checkpoint, OTHER) if args.checkpoint else (SMALL, None)
    given = {"seq_len": args.seq_len} | ({} if args.seed is None else {"seed": args.seed})
    return dataclasses.replace(config, **given), content


def _text(args: argparse.Namespace, config: Config, content: dict[str, Any] | None) -> torch.Tensor:
    """That of --text, else the checkpoint's own, else the default one."""
    if args.text or not content:
        return train.read_text(args.text, config.seq_len)
    files = content["text"]
    try:
        text = train.read_text(files, content["config"]["seq_len"])
    except UsageError as error:
        raise UsageError(f"the text that {args.checkpoint} was trained on is gone: {error}, by --text") from None
    if train.digest(text) != content["digest"]:
        what = ", ".join(files) if files else "the sources of Python's standard library"
        raise UsageError(f"{what}: not the text any more that {args.checkpoint} was trained on. Give one by --text")
    return train.read_text(files, config.seq_len)


def _print_shapes(where: torch.device) -> None:
    """A column for each case, a row for each gradient."""
    import pandas as pd

    from triton_lstm.terminal import print_table

    columns = gradient_shapes.rows(where)
    rows = [{"": name, **{column["case"]: column[name] for column in columns}} for name in columns[0] if name != "case"]
    print_table(pd.DataFrame(rows))


def _record(
    config: Config, content: dict[str, Any] | None, text: torch.Tensor, where: torch.device, *, last: bool
) -> Gradients:
    model = train.build(config, where, LSTM)
    if content:
        try:
            model.load_state_dict(content["model"])
        except Exception:
            raise UsageError(f"the checkpoint's weights do not fit its sizes. {OTHER}") from None
    _, held_out = train.split(text)
    tokens = train.window(held_out, config, 0, where)
    with record_gradients(model) as grads:
        scores, _ = model(tokens[:-1])
        scores, following = (scores[-1:], tokens[-1:]) if last else (scores, tokens[1:])
        torch.nn.functional.cross_entropy(scores.flatten(0, 1), following.flatten()).backward()
    return grads
