"""Time loops on a GPU that is not there: Triton's own driver and launcher over stand_in_cuda.c. Prints what arrived.

`python tests/helpers/stand_in_gpu.py GPU CASES` prints a line of JSON for each case in the JSON list CASES, for
test_launcher.py. The stand-in, as libcuda.so.1, is in LD_LIBRARY_PATH and TRITON_LIBCUDA_PATH. With TRITON_INTERPRET
set there would be nothing to launch.
"""

import contextlib
import ctypes
import json
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import compiler

from triton_lstm.core.packing import starts_and_lengths
from triton_lstm.kernels import device_facts, lstm_backward, lstm_backward_kernel, lstm_forward, lstm_forward_kernel
from triton_lstm.kernels.exchange import COPIES, INT_TYPE, LINE, SENTINEL
from triton_lstm.kernels.parts import parts_for
from triton_lstm.planning.devices import GPUS, Device
from triton_lstm.planning.plan import Plan
from triton_lstm.settings import spin_limit

KERNELS, LAUNCHES, PARAMETERS = 128, 512, 64  # as in stand_in_cuda.c
STREAM = 0x57EA
Tensors = dict[str, torch.Tensor | None]


class Gpu(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("major", "minor", "processors", "shared", "registers")]


class Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 64),
        ("parameters", ctypes.c_int),
        ("sizes", ctypes.c_int * PARAMETERS),
        ("most_shared", ctypes.c_int),
    ]


class Launch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("kernel", "result")),
        *((name, ctypes.c_int * 3) for name in ("grid", "block", "cluster")),
        *((name, ctypes.c_int) for name in ("shared", "cooperative", "attributes")),
        ("stream", ctypes.c_uint64),
        ("values", ctypes.c_uint64 * PARAMETERS),
    ]


class StandIn:
    """The stand-in for libcuda as one GPU, and torch.cuda where the kernels' host code and Triton's driver ask it."""

    def __init__(self, device: Device) -> None:
        library = ctypes.CDLL("libcuda.so.1")
        self.gpu = Gpu.in_dll(library, "gpu")
        self.kernels = (Kernel * KERNELS).in_dll(library, "kernels")
        self.launches = (Launch * LAUNCHES).in_dll(library, "launches")
        self.count = ctypes.c_int.in_dll(library, "launch_count")
        self.compiled: dict[int, int] = {}  # by a kernel's address: the shared memory that the compiler counted
        self.whole = device.processors, device.shared_bytes
        self.gpu.major, self.gpu.minor = capability = divmod(int(device.arch.removeprefix("sm_")), 10)
        self.gpu.registers = device.registers
        self.offer(*self.whole)
        torch.cuda.device = lambda _: contextlib.nullcontext()
        torch.cuda.current_device = lambda: 0
        torch.cuda.get_device_name = lambda _: device.name
        torch.cuda.get_device_capability = lambda _: capability
        torch.cuda.get_device_properties = lambda _: types.SimpleNamespace(L2_cache_size=device.l2_bytes)
        torch._C._cuda_getCurrentRawStream = lambda _: STREAM
        triton.runtime.driver.set_active(CudaDriver())
        knobs.runtime.kernel_load_end_hook.add(self.loaded)
        facts = device_facts(torch.device("cpu"))
        assert facts == device, f"{facts} is what arrived of {device}"

    def offer(self, processors: int, shared: int) -> None:
        """What a launch may have from now on, whatever `device_facts` has seen."""
        self.gpu.processors, self.gpu.shared = processors, shared
        compiler.max_shared_mem.cache_clear()

    def loaded(self, module: int, function: int, name: str, metadata_group: dict[str, str], hash: str) -> None:
        path = next(path for file, path in metadata_group.items() if file.endswith(".json"))
        self.compiled[function] = json.loads(Path(path).read_text())["shared"]

    def arrived(self, first: int) -> list[dict[str, Any]]:
        """The launches from the `first` on."""
        rows = []
        for launch in self.launches[first : self.count.value]:
            row = {name: getattr(launch, name) for name, _ in Launch._fields_}
            row |= {name: list(row[name]) for name in ("grid", "block", "cluster")}
            kernel = self.kernels[launch.kernel]
            row |= dict(name=kernel.name.decode(), counted=self.compiled[ctypes.addressof(kernel)])
            parameters = zip(kernel.sizes, row.pop("values"), strict=True)
            rows.append(row | dict(parameters=list(parameters)[: kernel.parameters]))
        return rows


class Fresh(TorchDispatchMode):
    """Keeps every tensor that is made, so that what the host code makes for itself is known and stays where it was."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not function.is_view and all(out is not argument for argument in args):
            self.made.append(out)
        return out

    def only(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        found = [tensor for tensor in self.made if (*tensor.shape,) == shape and tensor.dtype == dtype]
        assert len(found) == 1, f"{len(found)} new tensors {shape} of {dtype}, expected one"
        return found[0]


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def run_forward(
    plan: Plan, xg: torch.Tensor, w_hh: torch.Tensor, c0: torch.Tensor, index: Any, fresh: Fresh
) -> Tensors:
    """Runs lstm_forward; returns the tensors by the kernel's names for them, None for what it is compiled without."""
    D, B, H = c0.shape
    h0 = zeros(D, B, H) if index[0] is None else None
    with fresh:
        y, h_n, c_n, c_all = lstm_forward(xg, w_hh, h0, c0, *index, plan=plan, save_gates=True, save_c=True)
    if h0 is not None and D == 2:
        h0 = fresh.only(B, D, H, dtype=torch.bfloat16)
    c = fresh.only(D, B, H, dtype=torch.float32)
    states = dict(h0_ptr=h0, c0_ptr=c0, c_ptr=c, h_n_ptr=h_n, c_n_ptr=c_n)
    return states | dict(xg_ptr=xg, w_hh_ptr=w_hh, y_ptr=y, gates_ptr=xg, c_all_ptr=c_all)


def run_backward(
    plan: Plan, gates: torch.Tensor, w_hh: torch.Tensor, c0: torch.Tensor, index: Any, fresh: Fresh
) -> Tensors:
    """Runs lstm_backward, with all that it can be given; returns the tensors as `run_forward` does."""
    D, B, H = c0.shape
    rows = gates.shape[:-1]
    c_all, dc_all = (zeros(*rows, D * H, dtype=torch.float32) for _ in range(2))
    dy, dh_n, dc_n = zeros(*rows, D * H), zeros(D, B, H), zeros(D, B, H, dtype=torch.float32)
    dact, totals = torch.zeros_like(gates), zeros(*rows, D, 2, H, dtype=torch.float32)
    given = dict(dact=dact, dc_all=dc_all, totals=totals)
    with fresh:
        dgates, dc = lstm_backward(dy, dh_n, dc_n, w_hh, c0, gates, c_all, *index, plan=plan, **given)
    if D == 2:
        c0 = fresh.only(B, D, H, dtype=torch.float32)
    gradients = dict(dy_ptr=dy, dh_n_ptr=dh_n, dc_ptr=dc, dact_ptr=dact, dc_all_ptr=dc_all, dgates_ptr=dgates)
    return gradients | dict(totals_ptr=totals, w_hh_ptr=w_hh, c0_ptr=c0, gates_ptr=gates, c_all_ptr=c_all)


def call(plan: Plan, backward: bool, T: int, B: int, H: int, D: int, packed: bool, offset: int) -> Tensors:
    """Runs a time loop in bfloat16, forward or `backward`, with xg or the gates at an `offset` of so many elements."""
    index = starts_and_lengths(torch.full((T,), B), torch.device("cpu")) if packed else (None, None)
    gates = zeros(offset + T * B * D * 4 * H)[offset:].view(*((T * B,) if packed else (T, B)), D * 4 * H)
    w_hh, c0 = zeros(D * 4 * H, H), zeros(D, B, H, dtype=torch.float32)
    fresh = Fresh()
    tensors = (run_backward if backward else run_forward)(plan, gates, w_hh, c0, index, fresh)
    signals = None
    if plan.exchange != "none" or spin_limit():
        signals = fresh.only(1 + COPIES.value * D * -(-B // plan.block_b), LINE.value, dtype=torch.int32)
    parts = parts_for(plan, D, B, H, torch.device("meta"))
    if parts is not None:
        parts = fresh.only(*parts.shape, dtype=torch.int64)
    return tensors | dict(
        starts_ptr=index[0], lengths_ptr=index[1], resets_ptr=None, signals_ptr=signals, parts_ptr=parts
    )


def ready(exchange: str, exchanged: torch.Tensor, *zeroed: torch.Tensor | None) -> bool:
    """Whether what programs wait for is as it has to be before the first step. Nothing ran, so it still is."""
    size = exchanged.element_size()
    unwritten = (exchanged.view(INT_TYPE[size][0]) == SENTINEL).all()
    return bool(exchange != "flag" or unwritten) and not any(tensor.any() for tensor in zeroed if tensor is not None)


def run(stand_in: StandIn, plan: list[Any], limit: int, offers: list[Any], **case: Any) -> list[dict[str, Any]]:
    """Every call of a case, one with each of the `offers` of processors and shared memory (None: all)."""
    os.environ["TRITON_LSTM_SPIN_LIMIT"] = str(limit)
    kernel = lstm_backward_kernel if case["backward"] else lstm_forward_kernel
    calls = []
    for offer in offers:
        stand_in.offer(*(given or whole for given, whole in zip(offer, stand_in.whole, strict=True)))
        first = stand_in.count.value
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tensors = call(Plan(*plan), **case)
        exchanged = tensors["dgates_ptr" if case["backward"] else "y_ptr"]
        calls.append(
            dict(
                launches=stand_in.arrived(first),
                arguments=kernel.arg_names,
                stream=STREAM,
                pointers={name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
                ready=ready(plan[0], exchanged, tensors["signals_ptr"], tensors.get("parts_ptr")),
                warnings=[str(warning.message) for warning in caught],
            )
        )
    return calls


if __name__ == "__main__":
    machine = StandIn(GPUS[sys.argv[1]])
    for described in json.loads(sys.argv[2]):
        print(json.dumps(run(machine, **described)), flush=True)
