"""Text as bytes: reading, splitting and sampling batches."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import torch

from triton_lstm.settings import UsageError
from triton_lstm.training.config import Config

HELD_OUT = 20  # one in this many bytes of the text is held out


def read_text(files: list[str] | None, seq_len: int) -> torch.Tensor:
    """The concatenated bytes (uint8) of `files`, or of the sources of Python's standard library."""
    own = Path(sysconfig.get_paths()["stdlib"])
    paths = [Path(file) for file in files] if files else sorted(own.glob("*.py"))
    try:
        for path in paths:
            if path.exists() and not path.is_file():
                raise UsageError(f"the text {path} is not a regular file. Give readable files")
        data = b"\n".join(path.read_bytes() for path in paths)
    except OSError as error:
        raise UsageError(f"cannot read the text {error.filename}: {error.strerror}. Give readable files") from None
    except ValueError as error:  # no system call accepts such a name
        raise UsageError(f"invalid name of a text file ({error}). Give readable files") from None
    least = HELD_OUT * (seq_len + 2)
    if len(data) < least:
        what = ", ".join(files) if files else "Python's standard library" + ("" if data else " has no sources here")
        problem = f"{what}: {len(data):,} bytes are too few, --seq-len {seq_len} needs {least:,}"
        raise UsageError(f"{problem}. Give more --text, or a smaller --seq-len")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def digest(text: torch.Tensor) -> str:
    """A hash that identifies the text in checkpoints."""
    return hashlib.sha256(text.numpy().data).hexdigest()


def split(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The part to train on and the held-out end."""
    return text[: -(len(text) // HELD_OUT)], text[-(len(text) // HELD_OUT) :]


def window(text: torch.Tensor, config: Config, step: int, device: torch.device) -> torch.Tensor:
    """The batch of `step` (T+1, B). Depends on the seed and the step only, so a resumed run gets the same batches."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    starts = torch.randint(len(text) - config.seq_len, (config.batch,), generator=generator)
    return text[starts + torch.arange(config.seq_len + 1)[:, None]].long().to(device)
