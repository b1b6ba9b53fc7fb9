"""Training in several processes, counted: `torchrun --nproc-per-node N -m triton_lstm.perf.scaling`.

A row for each case: what a process hands to its process group in a step, what it sends, what it holds, and on a GPU its
time; beside every count what scaling_model.py predicts. Without torchrun, what one process does that has the share of a
batch that each of several would have. Without a GPU nothing is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.distributed.tensor import DTensor

from triton_lstm import dispatch
from triton_lstm.module import LSTM
from triton_lstm.perf.collectives import Collectives, sent_bytes
from triton_lstm.perf.results import write
from triton_lstm.perf.scaling_model import Case, predict, tokens_per_s
from triton_lstm.perf.store import results_folder
from triton_lstm.settings import UsageError, switches
from triton_lstm.system.machine import machine, now
from triton_lstm.training.batches import Batch
from triton_lstm.training.config import Config, Data, Execution, Model
from triton_lstm.training.model import build, state_dtype
from triton_lstm.training.processes import Processes, joined
from triton_lstm.training.trainer import MOMENTS, Trainer

WARM_UP, TIMED = 3, 20  # steps; DistributedDataParallel has its buckets from the second one on
TIMEOUT_S = 300
NOT_MEASURED = "not measured"
# layers, hidden, embed, vocabulary
MODELS = [(1, 512, 512, 256), (2, 1024, 512, 256), (4, 1024, 512, 256), (2, 1024, 512, 32000)]
# Steps, rows of all processes together; into how many parts a single process divides them, one after the other
GPU_SHAPE = 256, 64, (1, 2, 4, 8)
CPU_SHAPE = 4, 8, (1,)  # what is handed over does not depend on it
KEY = [*(field.name for field in dataclasses.fields(Case)), "ranks"]


class Saved:
    """Inside of the block: `bytes` of the memory that a model's forward pass saves for its backward pass, besides the
    weights as the modules see them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self._found, self._weights = model, dict[int, int](), set[int]()

    @property
    def bytes(self) -> int:
        return sum(number for place, number in self._found.items() if place not in self._weights)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self._found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def _see(self, module: torch.nn.Module, _: Any) -> None:
        self._weights |= {weight.untyped_storage().data_ptr() for weight in module.parameters(recurse=False)}

    @contextlib.contextmanager
    def count(self) -> Iterator[None]:
        # After fully_shard's hooks, which gather the weights
        handles = [module.register_forward_pre_hook(self._see) for module in self._model.modules()]
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield
        for handle in handles:
            handle.remove()


def trainer_of(case: Case, processes: Processes, device: torch.device, backend: str | None) -> tuple[Trainer, Batch]:
    """What `train` would have, and this process's rows of a random batch."""
    if case.batch % processes.size:
        raise UsageError(f"a batch of {case.batch} cannot be divided between {processes.size} processes")
    config = Config(
        data=Data(batch=case.batch, seq_len=case.seq_len),
        model=Model(hidden=case.hidden, layers=case.layers, embed=case.embed),
        execution=Execution(dtype=case.dtype, strategy="fsdp" if case.strategy == "fsdp" else "ddp"),
    )
    model = build(config, case.vocabulary, device, LSTM, backend=backend)
    shape = case.seq_len, case.batch // processes.size
    inputs, targets = (torch.randint(case.vocabulary, shape, device=device) for _ in range(2))
    batch = Batch(inputs, targets, torch.zeros(shape, dtype=torch.bool, device=device))
    trainer = Trainer(model, config, device, processes)
    trainer.prepare(batch)
    return trainer, batch


def measure(case: Case, processes: Processes, device: torch.device, backend: str | None = None) -> dict[str, Any]:
    """The columns of one case, of this process; KEY and provenance excepted."""
    trainer, batch = trainer_of(case, processes, device, backend)
    for _ in range(WARM_UP):
        trainer.train([batch])
    messages: dict[str, list[int]] = {kind: [] for kind in ("all-reduce", "all-gather", "reduce-scatter")}
    saved = Saved(trainer.model)
    with Collectives(lambda call: messages.setdefault(call.kind, []).append(call.bytes)), saved.count():
        trainer.train([batch])
    processes.any(False)  # all are here
    before = sent_bytes()
    trainer.train([batch])
    processes.any(False)
    sent = sent_bytes() - before
    counted: dict[str, Any] = {}
    for kind, sizes in messages.items():
        name = kind.replace("-", "_")
        counted |= {f"{name}s": len(sizes), f"{name}_bytes": sum(sizes)}
    weights = list(trainer.model.parameters())
    moments = [trainer.optimizer.state[weight][moment] for weight in weights for moment in MOMENTS]
    counted |= {
        "sent_bytes": sent if device.type == "cpu" else NOT_MEASURED,  # NCCL sends by other ways than TCP
        "parameter_bytes": _held(weights),
        "gradient_bytes": _held([weight.grad for weight in weights if weight.grad is not None]),
        "moment_bytes": _held(moments),
        "saved_bytes": saved.bytes,
    }
    predicted: dict[str, Any] = predict(case, processes.size, rings=device.type == "cuda")
    why_torch = dispatch.why_torch(state_dtype(trainer.config), device, backend)
    columns: dict[str, Any] = {"lstm": "kernels" if why_torch is None else f"PyTorch's own: {why_torch}"}
    if why_torch is not None:
        predicted["saved_bytes"] = "of the kernels only"
    for name, prediction in predicted.items():
        columns |= {name: counted.pop(name), f"{name}_predicted": prediction}
    return columns | counted | _timed(trainer, batch)


def _held(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of this process's parts."""
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)


def _timed(trainer: Trainer, batch: Batch) -> dict[str, Any]:
    if trainer.device.type != "cuda":
        return dict.fromkeys(("seconds", "tokens_per_s", "peak_bytes"), NOT_MEASURED)
    torch.cuda.reset_peak_memory_stats(trainer.device)
    torch.cuda.synchronize(trainer.device)
    begin = time.perf_counter()
    for _ in range(TIMED):
        trainer.train([batch])
    torch.cuda.synchronize(trainer.device)
    seconds = (time.perf_counter() - begin) / TIMED
    tokens = batch.inputs.numel() * trainer.processes.size
    peak = torch.cuda.max_memory_allocated(trainer.device)
    return {"seconds": seconds, "tokens_per_s": tokens / seconds, "peak_bytes": peak}


def cases(ranks: int, device: torch.device) -> Iterator[Case]:
    """Of one process, also what each of several would have to do."""
    steps, rows, parts = GPU_SHAPE if device.type == "cuda" else CPU_SHAPE
    dtype: Any = "bf16" if device.type == "cuda" else "fp32"
    for sizes in MODELS:
        if ranks > 1:
            yield Case("ddp", *sizes, steps, rows, dtype)
            yield Case("fsdp", *sizes, steps, rows, dtype)
        else:
            yield from (Case("none", *sizes, steps, rows // of, dtype) for of in parts)


def expected_time(rows: pd.DataFrame, case: Case, ranks: int, bandwidth: float | None) -> dict[str, Any]:
    """tokens/s by the model, of a case that was measured in one process with each one's share of the batch."""
    alone = dataclasses.asdict(dataclasses.replace(case, strategy="none", batch=case.batch // ranks)) | {"ranks": 1}
    found = rows[(rows[list(alone)].astype(str) == pd.Series(alone).astype(str)).all(axis=1)] if len(rows) else rows
    names = "tokens_per_s_least", "tokens_per_s_most"
    if not bandwidth or not len(found) or found.iloc[0]["seconds"] == NOT_MEASURED:
        return dict.fromkeys(names, NOT_MEASURED)
    return dict(zip(names, tokens_per_s(case, ranks, float(found.iloc[0]["seconds"]), bandwidth), strict=True))


def stored(path: Path, about: dict[str, Any]) -> pd.DataFrame:
    """The rows of earlier runs. Raises UsageError if they are of another machine or of other sources."""
    if not path.exists():
        return pd.DataFrame()
    rows = pd.read_csv(path, keep_default_na=False)
    for name in about.keys() - {"commit"}:
        theirs = sorted(set(rows[name].astype(str)) - {str(about[name])})
        if theirs:
            raise UsageError(f"{path} has {name} {theirs[0]!r}, this is {about[name]!r}. Give another file with --out")
    return rows


def run(path: Path, bandwidth: float | None, processes: Processes, device: torch.device) -> None:
    """Adds a row of each case to the CSV, in the place of an older one."""
    about = machine()
    rows = processes.checked(lambda: stored(path, about))
    for case in cases(processes.size, device):
        with switches(case.dtype):
            columns = measure(case, processes, device)
        row = dataclasses.asdict(case) | {"ranks": processes.size} | columns
        row |= expected_time(rows, case, processes.size, bandwidth) | about | {"date": now()}
        added = pd.DataFrame([row])
        rows = pd.concat([rows, added]).drop_duplicates(KEY, keep="last")
        if processes.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(rows, path)  # after every row, so that none is lost
            print(", ".join(f"{name} {row[name]}" for name in (*KEY, "sent_bytes", "tokens_per_s")), flush=True)


def main() -> int:
    """Exit status 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m triton_lstm.perf.scaling", description=__doc__.splitlines()[0])
    bandwidth_help = "out of one process, for a prediction of tokens/s from the rows of one process in the same file"
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help=bandwidth_help)
    out_help = "default: perf/results/<gpu>/scaling.csv, without a GPU perf/results/scaling.csv"
    parser.add_argument("--out", type=Path, metavar="CSV", help=out_help)
    args = parser.parse_args()
    try:
        with joined() as processes:
            device = torch.device("cpu")
            if torch.cuda.is_available():
                device = torch.device("cuda", processes.local_rank)
                torch.cuda.set_device(device)
            processes.open(device, TIMEOUT_S)
            folder = results_folder() if device.type == "cuda" else Path("perf", "results")
            together = processes if processes.size > 1 else Processes()
            run(args.out or folder / "scaling.csv", args.bandwidth and args.bandwidth * 1e9, together, device)
    except UsageError as error:
        if str(error):
            print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
