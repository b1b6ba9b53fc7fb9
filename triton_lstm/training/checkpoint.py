"""Checkpoints of `train`: folders that are written atomically, by all processes, and validated when they are read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from pydantic import ConfigDict, Field, InstanceOf, TypeAdapter, ValidationError, with_config
from torch import nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from typing_extensions import TypedDict

from triton_lstm.settings import LARGEST, UsageError
from triton_lstm.system.atomic_file import atomic_write, sync
from triton_lstm.system.signals import deferred_signals
from triton_lstm.training.config import Config
from triton_lstm.training.model import build, state_dtype
from triton_lstm.training.processes import Processes, ReportedError

FORMAT = 3
STATE = "state.json"  # written last, before the folder gets its name
UNFINISHED, DELETED = ".tmp", ".deleted"  # behind the names of folders
STRICT = ConfigDict(strict=True, extra="forbid")
CHUNK = 1 << 24  # bytes
Number = Annotated[int, Field(ge=0, le=LARGEST)]
NotNegative = Annotated[float, Field(ge=0)]
Shape = tuple[torch.Size, torch.dtype]


@with_config(STRICT)
class Best(TypedDict):
    """The validation with the smallest loss, in nats per token."""

    step: Number
    loss: float


@with_config(STRICT)
class Scaler(TypedDict):
    """The scale of the loss, and for how many steps it has been that."""

    scale: NotNegative
    age: Number


@with_config(STRICT)
class Progress(TypedDict):
    """What a run has shown so far.

    seconds: trained. logged, validated: the steps of the last losses in metrics.csv. loss_sum: of the steps since then.
    """

    seconds: NotNegative
    logged: Number
    loss_sum: float
    validated: Number
    best: Best | None


@with_config(STRICT)
class State(TypedDict):
    """What state.json has: all but the tensors.

    digest: of the tokens of all documents. tokens: the size of the vocabulary. updates: how many steps of the optimizer
    did not overflow. files: CRC-32 of each file with tensors.
    """

    format: Literal[3]
    config: InstanceOf[Config]
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    tokens: Annotated[int, Field(ge=2, le=LARGEST)]
    progress: Progress
    step: Number
    updates: Number
    scaler: Scaler | None
    files: dict[str, Annotated[int, Field(ge=0, lt=1 << 32)]]


CONFIG = TypeAdapter(Config)
CHECKED: TypeAdapter[State] = TypeAdapter(State)


def save_checkpoint(
    folder: Path, state: Mapping[str, Any], tensors: dict[str, torch.Tensor], processes: Processes
) -> None:
    """Writes to a temporary folder and renames it, so that a crash leaves what was there. Signals are deferred until it
    is done. All processes call it.

    Args:
        folder: of the step. If it is there, it has these tensors, and only what is around them is written.
        state: as in State, without format and files.
        tensors: by name; DTensors are written by the processes that have a shard.

    Raises UsageError in all processes if it cannot be written in one.
    """
    temporary = folder.with_name(f"{folder.name}{UNFINISHED}")
    with deferred_signals() as received, _removed_unless_complete(temporary, processes):
        if processes.from_rank_zero(lambda: (folder / STATE).is_file()):
            files = processes.from_rank_zero(lambda: read_state(folder, "Delete it")["files"])
            processes.from_rank_zero(_unless_full(folder, lambda: _write_state(folder, state, files)))
        else:
            processes.from_rank_zero(_unless_full(folder, lambda: _make_empty(temporary)))
            writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # without torchrun: that there is one process
                dcp.save(tensors, storage_writer=writer, process_group=processes.group, no_dist=processes.group is None)
            mine = processes.checked(_unless_full(folder, lambda: _sums(temporary, processes)))
            files = {name: crc for found in processes.gather(mine) for name, crc in found.items()}
            processes.from_rank_zero(_unless_full(folder, lambda: _finish(temporary, folder, state, files)))
    if received:  # pass it on to the outer handler
        signal.raise_signal(received[0])


def _write_state(folder: Path, state: Mapping[str, Any], files: dict[str, int]) -> None:
    content = {"format": FORMAT} | dict(state) | {"config": dataclasses.asdict(state["config"]), "files": files}
    with atomic_write(folder / STATE) as temporary, temporary.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _finish(temporary: Path, folder: Path, state: Mapping[str, Any], files: dict[str, int]) -> None:
    _write_state(temporary, state, files)
    os.rename(temporary, folder)
    sync(folder.parent)


def _sums(folder: Path, processes: Processes) -> dict[str, int]:
    """CRC-32 of this process's share of the files."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    return {name: _crc(folder / name) for name in names[processes.rank :: processes.size]}


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _unless_full(folder: Path, function: Callable[[], Any]) -> Callable[[], Any]:
    """The function, with its OSErrors as UsageErrors."""

    def call() -> Any:
        try:
            return function()
        except OSError as error:
            raise UsageError(f"cannot write the checkpoint {folder}: {error.strerror}") from None

    return call


@contextlib.contextmanager
def _removed_unless_complete(temporary: Path, processes: Processes) -> Iterator[None]:
    """Makes a UsageError of what torch.distributed.checkpoint raises in all processes."""
    try:
        yield
    except (CheckpointException, OSError) as error:
        shutil.rmtree(temporary, ignore_errors=True)  # it only takes space
        failures = error.failures if isinstance(error, CheckpointException) else {0: (error, None)}
        rank, (reason, _) = min(failures.items())
        if processes.rank:
            raise ReportedError from None
        where = f"rank {rank}: " if rank else ""
        what = f"{where}cannot write the checkpoint {temporary.with_suffix('')}"
        if not isinstance(reason, OSError):
            raise RuntimeError(f"{what}: {reason}") from reason
        raise UsageError(f"{what}: {reason.strerror}") from None


def read_state(folder: Path, advice: str) -> State:
    """What a checkpoint has besides tensors. Nothing in its files is executed.

    Raises UsageError for an unreadable or damaged one, the latter with `advice`.
    """
    path = folder / STATE
    with _undamaged(folder, advice):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict) and found.get("format") == FORMAT and "config" in found:
            found = found | {"config": CONFIG.validate_python(found["config"])}  # not strict: lists become tuples
        return CHECKED.validate_python(found)


def check_files(folder: Path, state: State, processes: Processes, advice: str) -> None:
    """Raises UsageError if the files of a checkpoint are not those that were written, or do not have the model of its
    configuration. Every process reads a share of them."""
    with _undamaged(folder, advice):
        if {path.name for path in folder.glob("*.safetensors")} != state["files"].keys():
            raise ValueError("files are missing or were added")
        for name, crc in _sums(folder, processes).items():
            if crc != state["files"][name]:
                raise ValueError(f"{name} has changed")
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
        stored: dict[str, Any] = metadata.state_dict_metadata
        found = {name: (tensor.size, tensor.properties.dtype) for name, tensor in stored.items()}
        too_many = state["config"].optimizer.accumulate > len(found)  # states: no list of billions is made
        if too_many or found != _expected(state):
            raise ValueError("the tensors do not match the sizes")
        if any(sum(chunk.sizes.numel() for chunk in t.chunks) != t.size.numel() for t in stored.values()):
            raise ValueError("a part of a tensor is missing")


def _expected(state: State) -> dict[str, Shape]:
    """Shape and dtype of all tensors of a checkpoint."""
    config = state["config"]
    with torch.device("meta"):  # allocates nothing, whatever the size
        model = build(config, state["tokens"], torch.device("meta"), nn.LSTM).state_dict()
    kinds = ("model", "exp_avg", "exp_avg_sq")
    shapes = {f"{kind}.{name}": (tensor.shape, tensor.dtype) for kind in kinds for name, tensor in model.items()}
    size = torch.Size((config.model.layers, config.data.batch, config.model.hidden))
    micro = range(config.optimizer.accumulate)
    return shapes | {f"{name}.{k}": (size, state_dtype(config)) for name in "hc" for k in micro}


def load_tensors(folder: Path, tensors: dict[str, torch.Tensor], processes: Processes, advice: str) -> None:
    """Fills the tensors, some or all of a checkpoint, whatever processes it was written by. All processes call it.

    Raises UsageError, with `advice`, if it is damaged.
    """

    def load() -> None:
        with _undamaged(folder, advice):
            reader = HuggingFaceStorageReader(str(folder))
            # Every process reads what it needs, without the others
            dcp.load(tensors, storage_reader=reader, no_dist=True)
            if any((t < 0).any() for name, t in tensors.items() if name.startswith("exp_avg_sq.")):
                raise ValueError("a second moment is negative")

    processes.checked(load)


@contextlib.contextmanager
def _undamaged(folder: Path, advice: str) -> Iterator[None]:
    """Makes a UsageError of what damaged files raise."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of PyTorch about a load without other processes
            yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:80]
        what = (
            "saved by another version of triton_lstm"
            if where == "format"
            else f"{where} {first['msg'].removeprefix('Value error, ')}".strip()
        )
        raise UsageError(f"{folder} is not a checkpoint of `train`, or is damaged: {what}. {advice}") from None
    except OSError as error:
        raise UsageError(f"cannot read the checkpoint {folder}: {error.strerror}. {advice}") from None
    except (Exception, CheckpointException) as error:
        if isinstance(error, UsageError | MemoryError):
            raise
        why = f": {error}" if isinstance(error, ValueError) and str(error).count("\n") == 0 else ""
        raise UsageError(f"{folder} is not a checkpoint of `train`, or is damaged{why}. {advice}") from None
