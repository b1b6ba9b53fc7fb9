"""The file of a tuned table: JSON, one entry per line. Every field is validated before it is used."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from triton_lstm.planning.devices import Device
from triton_lstm.planning.plan import Exchange, Plan
from triton_lstm.planning.problem import Problem
from triton_lstm.system.atomic_file import atomic_write

FORMAT = 2  # of the file
KERNELS = 3  # raised by a change to the kernels or to Plan that makes older measurements misleading
LOCK_S = 30  # how long to wait for another process that writes
LARGEST = 1 << 24  # bytes of a file; thousands of entries fit in one MiB
DType = Literal["bf16", "fp16", "tf32", "fp32"]
DTYPES: tuple[DType, ...] = get_args(DType)
Mode = Literal["inference", "training"]


class TableError(ValueError):
    """A file that is not a tuned table; the text says why."""


class OutdatedError(TableError):
    """A table of an older format or of older kernels."""


@dataclasses.dataclass(frozen=True)
class Key:
    """What tables are keyed by; never T. dtype: a precision's name. B: a bucket, see `bucket`."""

    backward: bool
    dtype: str
    H: int
    B: int

    @classmethod
    def of(cls, problem: Problem) -> Key:
        """The key that a problem's measurement has."""
        return cls(problem.backward, problem.precision, problem.H, bucket(problem.B))

    def on(self, device: Device, directions: int = 1) -> Problem:
        """This key's problem on a device; what is measured is one direction of time."""
        return Problem(device, self.dtype, self.B, self.H, self.backward, directions)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The best plan measured for a key.

    us: per step. planned_us: per step of the cost model's plan; None if that failed. measured: with which versions, and
    when.
    """

    key: Key
    plan: Plan
    us: float
    planned_us: float | None
    measured: str = ""


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """us per step of a whole one-layer LSTM with I = H, on the kernels and on PyTorch's own path."""

    mode: Mode
    dtype: str
    H: int
    B: int
    triton_us: float
    torch_us: float
    measured: str = ""


@dataclasses.dataclass
class Table:
    """about: the GPU's name, for people who read the file. plans and layers: see Tuned and LayerTime."""

    about: dict[str, str]
    plans: dict[Key, Tuned] = dataclasses.field(default_factory=dict)
    layers: dict[tuple[str, str, int, int], LayerTime] = dataclasses.field(default_factory=dict)

    def add(self, *entries: Tuned | LayerTime) -> None:
        for entry in entries:
            if isinstance(entry, Tuned):
                self.plans[entry.key] = entry
            else:
                self.layers[entry.mode, entry.dtype, entry.H, entry.B] = entry


def bucket(batch: int) -> int:
    """The batch size that stands for `batch` in a table: the next power of two, 16 at least."""
    return max(16, 1 << max(0, batch - 1).bit_length())


def read(path: Path) -> Table:
    """The table in a file. Raises OSError, and TableError where the file is not a table or is of other kernels."""
    if path.exists() and not path.is_file():
        raise TableError("it is not a regular file")
    with path.open("rb") as file:
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise TableError(f"it is larger than {LARGEST >> 20} MiB")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise TableError("it is not JSON") from None
    return parse(content)


def parse(content: Any) -> Table:
    """The table in decoded JSON. Raises TableError that names the first thing that is wrong."""
    head = _fields(content, {"format": int, "kernels": int, "about": dict, "plans": list, "layers": list}, "the file")
    if (head["format"], head["kernels"]) != (FORMAT, KERNELS):
        text = f"it is of format {head['format']} for kernels {head['kernels']}, these are {FORMAT} and {KERNELS}"
        raise (OutdatedError if (head["format"], head["kernels"]) < (FORMAT, KERNELS) else TableError)(text)
    if not all(isinstance(value, str) for value in head["about"].values()):
        raise TableError("`about` must hold texts")
    table = Table(dict(head["about"]))
    for k, row in enumerate(head["plans"]):
        table.add(_tuned(row, f"plans[{k}]"))
    for k, row in enumerate(head["layers"]):
        table.add(_layer_time(row, f"layers[{k}]"))
    return table


def _tuned(row: Any, where: str) -> Tuned:
    planned = type(None) if isinstance(row, dict) and row.get("planned_us", 0) is None else float
    types = {"direction": str, **_SHAPE, **_PLAN, "us": float, "planned_us": planned, "measured": str}
    fields = _fields(row, types, where)
    direction = _one_of(fields.pop("direction"), ("forward", "backward"), where)
    key = Key(direction == "backward", *_shape(fields, where))
    us = _above_0(fields.pop("us"), where)
    planned_us = fields.pop("planned_us")
    planned_us = None if planned_us is None else _above_0(planned_us, where)
    measured = fields.pop("measured")
    _one_of(fields["exchange"], get_args(Exchange), where)
    for name, most in _MOST.items():
        least = 8 if name == "block_h" else 16 if name in ("block_b", "block_k") else 1
        if not least <= fields[name] <= most or fields[name] & (fields[name] - 1):
            raise TableError(f"{where}: {name} must be a power of two from {least} to {most}, not {fields[name]}")
    odd = fields["warps"] not in (4, 8) or fields["slices"] not in (1, fields["warps"])
    odd = odd or (fields["splits"] > 1 and (not key.backward or fields["block_h"] < 8 * fields["splits"]))
    if odd or fields["block_k"] < 16 * fields["slices"] or fields["block_b"] * fields["block_h"] > 1 << 14:
        raise TableError(f"{where}: no kernel has such a tile")
    return Tuned(key, Plan(**fields, one_launch=True, groups=1), us, planned_us, measured)


def _layer_time(row: Any, where: str) -> LayerTime:
    fields = _fields(row, {"mode": str, **_SHAPE, "triton_us": float, "torch_us": float, "measured": str}, where)
    _one_of(fields["mode"], get_args(Mode), where)
    _shape(dict(fields), where)
    for name in ("triton_us", "torch_us"):
        fields[name] = _above_0(fields[name], where)
    return LayerTime(**fields)


_SHAPE: dict[str, type] = {"dtype": str, "H": int, "B": int}
_MOST = {"block_b": 256, "block_h": 1024, "block_k": 4096, "slices": 16, "warps": 16, "splits": 8}
_PLAN: dict[str, type] = {"exchange": str, "resident": bool} | dict.fromkeys(_MOST, int)


def _shape(fields: dict[str, Any], where: str) -> tuple[str, int, int]:
    dtype, hidden_size, batch = (fields.pop(name) for name in _SHAPE)
    _one_of(dtype, DTYPES, where)
    if not 1 <= hidden_size <= 1 << 20 or not 16 <= batch <= 1 << 40 or batch & (batch - 1):
        raise TableError(f"{where}: H must be from 1 to {1 << 20}, and B a power of two from 16 up")
    return dtype, hidden_size, batch


def _fields(row: Any, types: dict[str, type], where: str) -> dict[str, Any]:
    if not isinstance(row, dict) or row.keys() != types.keys():
        raise TableError(f"{where} must have the fields {', '.join(types)}")
    for name, kind in types.items():
        if name == "measured" and not (isinstance(row[name], str) and row[name].isprintable() and len(row[name]) < 200):
            raise TableError(f"{where}: measured must be a short printable text")
        if type(row[name]) is not kind and not (kind is float and type(row[name]) is int):
            raise TableError(f"{where}: {name} must be {kind.__name__}, not {str(row[name])[:40]!r}")
    return dict(row)


def _one_of(value: str, names: Iterable[str], where: str) -> str:
    if value not in names:
        raise TableError(f"{where}: must be one of {', '.join(names)}, not {value[:40]!r}")
    return value


def _above_0(value: float, where: str) -> float:
    if not 0 < value < 1e9:
        raise TableError(f"{where}: times must be us above 0 and below 1e9, not {str(value)[:20]}")
    return float(value)


def render(table: Table) -> str:
    """The table as JSON, one entry per line, sorted."""
    plans = [
        {"direction": "backward" if entry.key.backward else "forward"}
        | {name: getattr(entry.key, name) for name in _SHAPE}
        | {name: getattr(entry.plan, name) for name in _PLAN}
        | {"us": _short(entry.us), "planned_us": entry.planned_us and _short(entry.planned_us)}
        | {"measured": entry.measured}
        for entry in sorted(table.plans.values(), key=lambda entry: dataclasses.astuple(entry.key))
    ]
    layers = [
        {name: _short(v) if isinstance(v, float) else v for name, v in dataclasses.asdict(table.layers[key]).items()}
        for key in sorted(table.layers)
    ]
    head = json.dumps({"format": FORMAT, "kernels": KERNELS, "about": table.about})[:-1]
    lists = (f'"{name}": [\n{_lines(rows)}]' for name, rows in (("plans", plans), ("layers", layers)))
    return f"{head},\n{','.join(lists)}}}\n"


def _short(us: float) -> float:
    return float(f"{us:.4g}")


def _lines(rows: list[dict[str, Any]]) -> str:
    return ",\n".join(json.dumps(row) for row in rows) + "\n" * bool(rows)


def update(path: Path, gpu: str, *entries: Tuned | LayerTime) -> None:
    """Adds entries to the table in a file, atomically and one process at a time.

    A table of older kernels is replaced. Raises OSError, also where another process holds the lock for LOCK_S, and
    TableError where the file is anything but a table.
    """
    import filelock

    path = path.resolve()  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock", timeout=LOCK_S):
        table = Table({})
        if path.exists():
            with contextlib.suppress(OutdatedError):
                table = read(path)
        table.about = {"gpu": gpu}
        table.add(*entries)
        text = render(table)
        parse(json.loads(text))  # nothing is written that could not be read back
        with atomic_write(path) as fresh:
            fresh.write_text(text)
