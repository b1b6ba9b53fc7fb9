"""The main job: a byte-level language model (embedding, LSTM stack, head) trained on real text."""

from __future__ import annotations

import copy
import hashlib
import math
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from triton_lstm.config import DTYPES, Config, UsageError
from triton_lstm.terminal import Bar

BETAS = (0.8, 0.95)  # of Adam: short memories, since runs are of hundreds of steps
EPS = 1e-5  # Adam's; smaller, and it makes whole steps of what rounding leaves of a gradient
HELD_OUT = 20  # one part in so many of the text is never trained on
EVALUATED = 8192  # bytes of it at once, or as many as a step of training has


class LanguageModel(nn.Module):
    """Bytes in, scores of the next byte out. The LSTM computes in `dtype` from weights kept in their own."""

    def __init__(self, lstm: nn.RNNBase, embed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.embed = nn.Embedding(256, embed)
        self.lstm = lstm
        self.head = nn.Linear(lstm.hidden_size, 256)

    def forward(self, tokens: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        """tokens (T, B) -> scores (T, B, 256) and the LSTM's state."""
        weights = {name: weight.to(self.dtype) for name, weight in self.lstm.named_parameters()}
        x = self.embed(tokens).to(self.dtype)
        y, state = torch.func.functional_call(self.lstm, weights, (x, state))
        return self.head(y.to(self.head.weight.dtype)), state


def build(
    config: Config, device: torch.device, lstm_class: type, dtype: str | None = None, **kwargs: Any
) -> LanguageModel:
    """The model of `config` on `device`: the same seed gives the same weights for every class of LSTM."""
    torch.manual_seed(config.seed)
    compute = DTYPES[dtype or config.dtype]
    lstm = lstm_class(config.embed, config.hidden, config.layers, **kwargs)
    model = LanguageModel(lstm, config.embed, compute).to(device)
    return model.double() if compute == torch.float64 else model


def read_text(files: list[str] | None, seq_len: int) -> torch.Tensor:
    """The bytes of `files`, or of Python's own standard library, one after another (uint8)."""
    own = Path(sysconfig.get_paths()["stdlib"])
    paths = [Path(file) for file in files] if files else sorted(own.glob("*.py"))
    try:
        for path in paths:
            if path.exists() and not path.is_file():
                raise UsageError(f"the text {path} is not a regular file. Give readable files")
        data = b"\n".join(path.read_bytes() for path in paths)
    except OSError as error:
        raise UsageError(f"cannot read the text {error.filename}: {error.strerror}. Give readable files") from None
    except ValueError as error:  # no system call takes such a name
        raise UsageError(f"a text cannot have such a name ({error}). Give readable files") from None
    least = HELD_OUT * (seq_len + 2)
    if len(data) < least:
        what = ", ".join(files) if files else "Python's standard library" + ("" if data else " has no sources here")
        few = f"{what}: {len(data):,} bytes are too few, --seq-len {seq_len} needs {least:,}"
        raise UsageError(f"{few}. Give more --text, or a smaller --seq-len")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def digest(text: torch.Tensor) -> str:
    """What tells a text from another, in checkpoints."""
    return hashlib.sha256(text.numpy().data).hexdigest()


def split(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The part to train on and the held-out end."""
    return text[: -(len(text) // HELD_OUT)], text[-(len(text) // HELD_OUT) :]


def window(text: torch.Tensor, config: Config, step: int, device: torch.device) -> torch.Tensor:
    """The batch of `step` (T+1, B): a function of the seed and the step alone, so that a resumed run sees the same."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    starts = torch.randint(len(text) - config.seq_len, (config.batch,), generator=generator)
    return text[starts + torch.arange(config.seq_len + 1)[:, None]].long().to(device)


def loss_of(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of every next byte, in nats."""
    scores, _ = model(tokens[:-1])
    return nn.functional.cross_entropy(scores.flatten(0, 1), tokens[1:].flatten())


def learning_rate(config: Config, step: int) -> float:
    """Of a step counted from 0; no matter how many there will be, so that any run can go on."""
    share = (step + 1) / config.warmup
    return config.lr * min(share, share**-0.5)


class Trainer:
    """A model, its optimizer, and the losses so far."""

    def __init__(self, model: LanguageModel, config: Config) -> None:
        self.model, self.config = model, config
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=BETAS, eps=EPS)
        self.losses: list[float] = []

    def step(self, tokens: torch.Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, len(self.losses))
        self.optimizer.zero_grad()
        loss = loss_of(self.model, tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        return self.losses[-1]

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here to the same losses."""
        weights, state = dict(self.model.named_parameters()), self.optimizer.state  # empty before the first step
        moments = {
            kind: {name: state[weight].get(kind, torch.zeros_like(weight)) for name, weight in weights.items()}
            for kind in ("exp_avg", "exp_avg_sq")
        }
        return {"losses": self.losses, "model": dict(self.model.state_dict()), **moments}

    def restore(self, content: dict[str, Any]) -> None:
        """content: what `state` returned, from a checkpoint perhaps."""
        self.model.load_state_dict(content["model"])
        self.losses = content["losses"]
        done = torch.tensor(float(len(self.losses)))
        states = [
            {"step": done.clone()} | {kind: content[kind][name].clone() for kind in ("exp_avg", "exp_avg_sq")}
            for name, _ in self.model.named_parameters()
        ]
        state = {"state": dict(enumerate(states)), "param_groups": self.optimizer.state_dict()["param_groups"]}
        self.optimizer.load_state_dict(state)


def run(
    trainers: list[Trainer],
    text: torch.Tensor,
    config: Config,
    steps: int,
    device: torch.device,
    save: Any,
    every: int,
    stop: Sequence[Any] = (),
) -> None:
    """Trains every trainer on the same batches up to step `steps`, or until `stop` holds something. The first one is
    shown."""
    first = trainers[0]
    begin = len(first.losses)
    with Bar(total=steps, initial=begin, unit="step") as bar:
        for step in range(begin, steps):
            tokens = window(text, config, step, device)
            start = time.perf_counter()
            loss = first.step(tokens)
            rate = config.seq_len * config.batch / (time.perf_counter() - start)
            for trainer in trainers[1:]:
                trainer.step(tokens)
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s")
            bar.update()
            if (step + 1) % every == 0 and step + 1 < steps:
                save()
            if stop:
                break


@torch.no_grad()
def bits_per_byte(model: LanguageModel, held_out: torch.Tensor, config: Config, device: torch.device) -> float:
    """The mean over every byte of the held-out text but the first, in windows as in training: one after another.

    On the CPU by PyTorch's own LSTM: the interpreter would take as long as for hundreds of steps of training.
    """
    if device.type == "cpu":
        model = copy.deepcopy(model)
        model.lstm.backend = "torch"
    total, count = 0.0, len(held_out) - 1
    whole = count // config.seq_len
    together = max(config.batch, EVALUATED // config.seq_len)
    windows = held_out[: whole * config.seq_len + 1].unfold(0, config.seq_len + 1, config.seq_len)
    rest = held_out[whole * config.seq_len :].unsqueeze(0)
    batches = [*windows.split(together), *([rest] if rest.shape[1] > 1 else [])]
    for batch in Bar(batches, desc="held out", unit="batch", delay=5, leave=False):
        tokens = batch.t().long().to(device)
        total += loss_of(model, tokens).item() * tokens[1:].numel()
    return total / count / math.log(2)


@torch.no_grad()
def sample(model: LanguageModel, length: int, config: Config, device: torch.device) -> str:
    """`length` bytes drawn one by one at temperature 0.7, after a line break."""
    generator = torch.Generator().manual_seed(config.seed)
    token = torch.full((1, 1), ord("\n"), device=device)
    state, drawn = None, []
    for _ in range(length):
        scores, state = model(token, state)
        probabilities = (scores[0, 0].float().cpu() / 0.7).softmax(0)
        if not probabilities.isfinite().all():
            return "none: the model's scores are not finite"
        drawn.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        token.fill_(drawn[-1])
    return bytes(drawn).decode("utf-8", "replace").encode("unicode_escape").decode()


def compare(ours: list[float], theirs: list[float], exact: list[float]) -> list[dict[str, Any]]:
    """A row a step. allowed: twice nn.LSTM's largest distance so far from nn.LSTM in float64, plus 1e-4 of the loss."""
    rows, spread = [], 0.0
    for step, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        if math.isfinite(b - c):
            spread = max(spread, abs(b - c))
        allowed = 2 * spread + 1e-4 * abs(b)
        ok = abs(a - b) <= allowed or (math.isnan(a) and math.isnan(b))
        rows.append(
            {
                "step": step,
                "triton_lstm": a,
                "nn.LSTM": b,
                "difference": abs(a - b),
                "allowed": allowed,
                "ok": ok,
            }
        )
    return rows
