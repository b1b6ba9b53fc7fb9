"""The command gradients of `python -m triton_lstm`."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from triton_lstm.cli.common import check_plot, checked_backend, command_device, positive, seed_number
from triton_lstm.gradients import shapes as gradient_shapes
from triton_lstm.gradients.record import record_gradients
from triton_lstm.gradients.results import Gradients
from triton_lstm.module import LSTM
from triton_lstm.settings import UsageError, require

if TYPE_CHECKING:  # they need packages that `_gradients` asks for
    from triton_lstm.training.batches import Batch
    from triton_lstm.training.checkpoint import State
    from triton_lstm.training.config import Config
    from triton_lstm.training.model import LanguageModel
    from triton_lstm.training.text.corpus import Corpus

SEQ_LEN = 100
OTHER = "Give another --checkpoint"


def add_commands(commands: Any) -> None:
    """Adds gradients to the subparsers of the command line."""
    g = commands.add_parser("gradients", help="show the gradients inside an LSTM: shapes, how far back they reach")
    what = "saved by `train`; the newest one of a run, or of a folder of runs (default: a random model)"
    g.add_argument("--checkpoint", type=Path, metavar="PATH", help=what)
    g.add_argument(
        "--text",
        nargs="+",
        metavar="PATH",
        help="default: the text of the checkpoint, or the sources of Python's standard library",
    )
    g.add_argument("--seq-len", type=positive, default=SEQ_LEN, metavar="TOKENS", help=f"steps (default: {SEQ_LEN})")
    g.add_argument("--loss", choices=["last", "every"], default="last", help="loss of which tokens (default: last)")
    g.add_argument("--plot", type=Path, metavar="FILE", help="save a figure there, .png or .svg")
    g.add_argument("--seed", type=seed_number, help="seed of the batch and of a random model (default: 0)")
    g.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")
    g.set_defaults(run=_gradients)


def _gradients(args: argparse.Namespace) -> int:
    device = command_device(args.device)
    require("matplotlib", "pandas", "pydantic", "rich", "safetensors", extra="train")
    from triton_lstm.training.batches import Windows
    from triton_lstm.training.checkpoint import load_tensors
    from triton_lstm.training.model import autocast, build
    from triton_lstm.training.processes import Processes

    if args.plot:
        check_plot(args.plot)
    config, content = _model_config(args)
    interpreted = not checked_backend(torch.float32, device) and device.type == "cpu"
    corpus = _text(args, config, content)
    batch = Windows(corpus, corpus.split()[1], config.data, config.execution.seed)[0].to(device)
    if interpreted:
        print("this takes a minute or more in Triton's interpreter (no GPU)", flush=True)
    _print_shapes(device)
    print(
        "output.grad is None unless output.retain_grad() was called before backward(),\n"
        "since the output is not a leaf. record_gradients provides it: grads.output is\n"
        "the direct gradient of the output, zero at steps that the loss does not use;\n"
        "grads.hidden is the total, including the gradient through time. h0: layer 0.\n"
    )
    model = build(config, corpus.vocabulary.size, device, LSTM)
    if content:
        weights = {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}
        load_tensors(args.checkpoint, weights, Processes(), OTHER)
    with autocast(config, device):
        grads = _record(model, batch, last=args.loss == "last")
    source = f"the model of {args.checkpoint}" if args.checkpoint else "a random model"
    of = "the last token" if args.loss == "last" else "every token"
    which = "held-out text" if args.checkpoint and not args.text else "text"
    print(f"{source}, {config.data.batch} sequences of {config.data.seq_len} tokens of {which}, loss of {of}:")
    print(grads.summary())
    if args.plot:
        grads.plot(args.plot)
        print(f"figure: {args.plot}")
    return 0


def _model_config(args: argparse.Namespace) -> tuple[Config, State | None]:
    """The configuration of the checkpoint or of a random model, with this command's seq_len, and the checkpoint."""
    from pydantic import TypeAdapter

    from triton_lstm.training.checkpoint import check_files, read_state
    from triton_lstm.training.config import ON_CPU, Config
    from triton_lstm.training.processes import Processes
    from triton_lstm.training.run_folder import newest_checkpoint

    content = None
    config = TypeAdapter(Config).validate_python(ON_CPU)
    if args.checkpoint:
        args.checkpoint = newest_checkpoint(args.checkpoint)
        content = read_state(args.checkpoint, OTHER)
        check_files(args.checkpoint, content, Processes(), OTHER)
        config = content["config"]
    data = dataclasses.replace(config.data, seq_len=args.seq_len)
    execution = config.execution if args.seed is None else dataclasses.replace(config.execution, seed=args.seed)
    return dataclasses.replace(config, data=data, execution=execution), content


def _text(args: argparse.Namespace, config: Config, content: State | None) -> Corpus:
    """The text of --text, else the checkpoint's own, else the default one."""
    from triton_lstm.training.text.corpus import open_corpus

    if args.text or not content:
        text = tuple(map(os.path.abspath, args.text or ()))
        corpus = open_corpus(dataclasses.replace(config.data, text=text))
        if content and corpus.vocabulary.size != content["tokens"]:
            raise UsageError(f"{args.checkpoint} was trained with another tokenizer. {OTHER}")
        return corpus
    try:
        corpus = open_corpus(config.data)
    except UsageError as error:
        problem = f"the text that {args.checkpoint} was trained on is not available"
        raise UsageError(f"{problem}: {error}") from None
    if corpus.digest != content["digest"]:
        what = ", ".join(config.data.text) or "the sources of Python's standard library"
        raise UsageError(f"{what}: no longer the text that {args.checkpoint} was trained on. Give one with --text")
    return corpus


def _print_shapes(device: torch.device) -> None:
    """Prints one column per case, one row per gradient."""
    import pandas as pd

    from triton_lstm.system.terminal import print_table

    columns = gradient_shapes.rows(device)
    rows = [{"": name, **{column["case"]: column[name] for column in columns}} for name in columns[0] if name != "case"]
    print_table(pd.DataFrame(rows))


def _record(model: LanguageModel, batch: Batch, *, last: bool) -> Gradients:
    with record_gradients(model) as grads:
        logits, _ = model(batch.inputs)
        logits, targets = (logits[-1:], batch.targets[-1:]) if last else (logits, batch.targets)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()).backward()
    return grads
