"""A process that believes it has a GPU: Triton compiles for it and launches, and the emulator runs what was compiled.

Everything up to the driver is real: dispatch, plans, `launch`, fills, Triton's specialization and its cache. The driver
is this one, whose machine code is PTX and whose tensors are on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from triton_lstm import dispatch, settings
from triton_lstm.kernels import launch
from triton_lstm.planning.devices import Device, known_gpu

from .faults import Fault
from .kernel import Kernel
from .machine import run
from .schedule import Schedule, shrink
from .tensors import Allowed

# Kernel arguments that no kernel may store to, unless the same tensor is also another argument
BOTH = ("w_hh_ptr", "c0_ptr", "starts_ptr", "lengths_ptr", "resets_ptr")
INPUTS = {
    "lstm_forward_kernel": {*BOTH, "xg_ptr", "h0_ptr"},
    "lstm_backward_kernel": {*BOTH, "dy_ptr", "dh_n_ptr", "dact_ptr", "dc_all_ptr", "gates_ptr", "c_all_ptr"},
}
THE_DATA_IS_THE_FLAG = (
    "rows are polled while they are written; a row counts only if none of its elements, which are written once, is the "
    "sentinel any more (triton_lstm/kernels/exchange.py)"
)
A_WORD_HAS_ITS_STEP = (
    "a word is polled while it is written; it counts only with its step's number, which is one element with the value "
    "(triton_lstm/kernels/parts.py)"
)
GAVE_UP = [
    Allowed(name, frozenset({"weak store"}), "all that store there store 1, and only the host reads it")
    for name in ("signals_ptr", "late_ptr")
]
POLLED = frozenset({"relaxed load", "weak store"})
BETWEEN_PROGRAMS = [*GAVE_UP, Allowed("parts_ptr", POLLED, A_WORD_HAS_ITS_STEP)]
# By exchange: the races that are right
ALLOWED = {
    "none": GAVE_UP,
    "barrier": BETWEEN_PROGRAMS,
    "flag": [
        *BETWEEN_PROGRAMS,
        *(Allowed(name, POLLED, THE_DATA_IS_THE_FLAG) for name in ("y_ptr", "dgates_ptr", "buffer_ptr")),
    ],
}
POISON = 0x7FFD  # every 16 bits of memory that was allocated and not written: NaN in all formats, and nobody else's
CELL = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_devices = itertools.count()  # one for each machine: Triton keeps compiled kernels by device


@dataclasses.dataclass
class Machine:
    """A GPU that is not there.

    device: which. seed, weak: of the first launch's Schedule; the next ones count on. edit: changes the PTX before it
    is run. schedule: takes the place of all launches' own. patience: of `run`. shrinks: whether a Fault names a
    shorter schedule that fails, too. launches: of each the kernel's name, its grid, and whether it was cooperative.
    """

    device: Device
    seed: int = 0
    weak: bool = False
    edit: Callable[[str], str] | None = None
    schedule: Schedule | None = None
    patience: int = 5
    shrinks: bool = False
    launches: list[tuple[str, tuple[int, int, int], bool]] = dataclasses.field(default_factory=list)
    kernels: dict[str, Kernel] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.number = next(_devices)

    # What Triton asks a driver
    @property
    def utils(self) -> Machine:
        return self

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.device.arch.removeprefix("sm_")), self.device.warp_size)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self.device.shared_bytes,
            "multiprocessor_count": self.device.processors,
            "max_num_regs": self.device.registers,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        ptx = binary.decode()
        ptx = self.edit(ptx) if self.edit else ptx
        if ptx not in self.kernels:
            self.kernels[ptx] = Kernel(ptx)
        return name, self.kernels[ptx], 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        names = list(source.signature)
        constants = {name for name, kind in source.signature.items() if kind == "constexpr"}

        def launcher(x: int, y: int, z: int, stream: int, kernel: Kernel, *rest: Any) -> None:
            given = dict(zip(names, rest[4:], strict=True))  # after the metadata and the hooks
            exchange = getattr(given.get("LAYER"), "EXCHANGE", given.get("EXCHANGE", "none"))
            passed = {name: value for name, value in given.items() if name not in constants}
            cooperative = bool(metadata.launch_cooperative_grid)
            if cooperative and x * y * z > self.device.processors * self._programs_at_once(metadata):
                raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
            self._launch(kernel, passed, (x, y, z), metadata.shared, cooperative, ALLOWED[exchange])

        return launcher

    def _programs_at_once(self, metadata: Any) -> int:
        """On one processor, by threads and shared memory, of which each program takes 1 KiB more than it asks for."""
        by_threads = 2048 // (32 * metadata.num_warps)
        return max(1, min(by_threads, (self.device.shared_bytes + 1024) // (metadata.shared + 1024)))

    def _launch(self, kernel: Kernel, passed: dict[str, Any], grid: tuple[int, int, int], *rest: Any) -> None:
        shared, cooperative, allowed = rest
        schedule = self.schedule or Schedule(self.seed + len(self.launches), self.weak)
        arguments = arguments_of(kernel.text.name, passed)
        before = [None if isinstance(a, int) else a[1].copy() for a in arguments]

        def once(schedule: Schedule) -> None:
            run(
                kernel,
                arguments,
                grid,
                shared,
                cooperative=cooperative,
                schedule=schedule,
                allowed=allowed,
                patience=self.patience,
            )

        def fails(schedule: Schedule) -> bool:
            for argument, values in zip(arguments, before, strict=True):
                if values is not None:
                    argument[1][:] = values
            try:
                once(schedule)
            except Fault:
                return True
            return False

        try:
            once(schedule)
        except Fault as fault:
            if self.shrinks:
                raise Fault(f"{fault}\nFewer decisions that fail, too: {shrink(schedule, fails)}") from None
            raise
        self.launches.append((kernel.text.name, grid, cooperative))


def arguments_of(kernel: str, passed: dict[str, Any]) -> list[Any]:
    """What `run` takes, of a kernel's arguments; tensors that are passed twice are one."""
    tensors: dict[tuple[int, int], list[str]] = {}
    for name, value in passed.items():
        if isinstance(value, torch.Tensor):
            if not value.is_contiguous():
                raise Fault(f"{kernel}: {name} is not contiguous")
            begin, nbytes = value.data_ptr(), value.numel() * value.element_size()
            for (other, size), names in tensors.items():
                if begin < other + size and other < begin + nbytes and (other, size) != (begin, nbytes):
                    raise Fault(f"{kernel}: {name} overlaps {names[0]}")
            tensors.setdefault((begin, nbytes), []).append(name)
    made: dict[str, Any] = {}
    for names in tensors.values():
        value = passed[names[0]].detach().reshape(-1)
        cells = value.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])
        bits = cells.numpy().view(CELL[value.element_size()])
        written = bits != poison(bits.dtype)
        read_only = all(name in INPUTS.get(kernel, ()) for name in names)
        argument = ("=".join(names), bits, written, value.data_ptr(), read_only)
        made |= dict.fromkeys(names, argument)
    return [made[name] if name in made else int(value) for name, value in passed.items()]


def poison(dtype: np.dtype) -> Any:
    """The bits of an element that nobody wrote."""
    return np.full(max(1, dtype.itemsize // 2), POISON, np.uint16).view(dtype)[0]


@contextlib.contextmanager
def gpu(name: str, **options: Any) -> Iterator[Machine]:
    """Inside the block the kernels take CPU tensors as those of a GPU, and run in the emulator.

    name: "A100", "H100" and so on. options: of Machine. The process must not interpret kernels (TRITON_INTERPRET).

    Raises Fault, from the call that launches, for what the kernel does wrong.
    """
    machine = Machine(known_gpu(name), **options)
    before = driver._active if hasattr(driver, "_active") else None
    stages = knobs.runtime.add_stages_inspection_hook
    caches = launch.device_facts, launch._prepared
    with contextlib.ExitStack() as stack:
        for patch in _patches(machine):
            stack.enter_context(patch)
        driver.set_active(machine)
        knobs.runtime.add_stages_inspection_hook = _until_ptx
        try:
            for cache in caches:
                cache.cache_clear()
            launch._refused.clear()
            yield machine
        finally:
            driver._active = before
            knobs.runtime.add_stages_inspection_hook = stages
            for cache in caches:
                cache.cache_clear()
            launch._refused.clear()


def _until_ptx(backend: Any = None, stages: Any = None, *rest: Any) -> tuple[str, str] | None:
    """Triton's hook for its compiler's stages: the machine code is the PTX. Without arguments: what its cache adds."""
    if stages is None:
        return "PTX is the machine code", "ptx"
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


def _patches(machine: Machine) -> Iterator[Any]:
    """Where the library and PyTorch ask what a tensor's device is, the answer is: this GPU."""
    cuda = torch.device("cuda", 0)
    precision, no_kernel = settings.product_precision, dispatch.no_kernel_for
    for owner in (settings, launch):
        yield mock.patch.object(owner, "product_precision", lambda dtype, device: precision(dtype, cuda))
    yield mock.patch.object(
        dispatch, "no_kernel_for", lambda kind, dtype: no_kernel({"cpu": "cuda"}.get(kind, kind), dtype)
    )
    yield mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext())
    yield mock.patch.object(torch.cuda, "get_device_name", return_value=machine.device.name)
    facts = SimpleNamespace(L2_cache_size=machine.device.l2_bytes, name=machine.device.name)
    yield mock.patch.object(torch.cuda, "get_device_properties", return_value=facts)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        yield mock.patch.object(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Memory that nobody wrote can be told from any other."""

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = allocate(*args, **kwargs)
        plain = type(out) is torch.Tensor and out.device.type == "cpu" and out.is_contiguous()
        if plain and out.element_size() > 1 and out.numel():
            out.detach().reshape(-1).view(torch.int16).fill_(POISON)
        return out

    return empty
