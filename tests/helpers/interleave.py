"""A concurrent interpreter: the programs of a Triton launch run in turns, switched at every access to memory.

One greenlet per program and a seeded scheduler. Loads and stores of a tile are torn in two, with other programs in
between. Memory is sequentially consistent: a missing fence or debug barrier cannot show here.
"""

import contextlib
import contextvars
import inspect
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet
from tracing import untraced
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

PATIENCE = 20_000  # accesses without a store after which the programs wait for each other for ever


OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "launch_cooperative_grid"}


class DeadlockError(AssertionError):
    """No program stored anything for PATIENCE accesses."""


class Scheduler:
    """Runs the programs of one launch; `turn` is called by them at every access to memory."""

    def __init__(self, seed: int, switches: float) -> None:
        self.random, self.switches = random.Random(seed), switches
        self.since_store = 0
        self.main: Any = None
        self.grids: list[tuple[int, ...]] = []  # of every launch so far

    def run(self, programs: list[tuple[tuple[int, int, int], Any]]) -> None:
        builder = interpreter.interpreter_builder
        self.main = getcurrent()
        waiting = [(index, greenlet(program)) for index, program in programs]
        for _, program in waiting:
            program.gr_context = contextvars.copy_context()  # NumPy's errstate of the launch
        while waiting:
            k = self.random.randrange(len(waiting))
            index, program = waiting[k]
            builder.set_grid_idx(*index)
            program.switch()
            if program.dead:
                waiting.pop(k)
                self.since_store = 0
            if self.since_store > PATIENCE:
                raise DeadlockError(
                    f"no store for {PATIENCE} accesses; still running: {[index for index, _ in waiting]}"
                )

    def turn(self, stores: bool = False) -> None:
        self.since_store = 0 if stores else self.since_store + 1
        likely = 0.5 if stores else self.switches
        if self.main is not None and getcurrent() is not self.main and self.random.random() < likely:
            self.main.switch()

    def halves(self, mask: TensorHandle) -> tuple[TensorHandle, TensorHandle, np.ndarray]:
        chosen = np.random.default_rng(self.random.getrandbits(32)).random(np.shape(mask.data)) < 0.5
        return (
            TensorHandle(mask.data & chosen, mask.dtype),
            TensorHandle(mask.data & ~chosen, mask.dtype),
            chosen,
        )


@contextlib.contextmanager
def concurrent_programs(seed: int, switches: float = 0.5) -> Iterator[Scheduler]:
    """Inside the block every interpreted launch runs its programs concurrently, in an order `seed` decides.

    switches: how likely another program goes on before a load; with few of them one is held up in a store while others
    pass.
    """
    scheduler = Scheduler(seed, switches)
    shipped = {
        name: getattr(InterpreterBuilder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
    }

    def load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        first, second, chosen = scheduler.halves(mask)
        scheduler.turn()
        a = shipped["create_masked_load"](self, ptrs, first, other, *rest)
        scheduler.turn()
        b = shipped["create_masked_load"](self, ptrs, second, other, *rest)
        return TensorHandle(np.where(chosen, a.data, b.data), a.dtype)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for half in scheduler.halves(mask)[:2]:
            scheduler.turn(stores=True)
            shipped["create_masked_store"](self, ptrs, value, half, *rest)

    def atomic(self: Any, *args: Any) -> Any:
        scheduler.turn()
        return shipped["create_atomic_rmw"](self, *args)

    def call(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        if kwargs.pop("warmup", False):  # this and the grid are there with Triton 3.5
            return
        kwargs.pop("grid", None)
        names = inspect.getfullargspec(self.fn).args
        unknown = set(kwargs) - set(names) - OPTIONS
        assert not unknown, f"unknown launch arguments {unknown}"
        scope = interpreter._patch_lang(self.fn)
        try:
            bound = inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in names})
            bound = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in bound.items()}
            grid = (*(self.grid(bound) if callable(self.grid) else self.grid), 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*grid)
            scheduler.grids.append(grid)
            with untraced():
                scheduler.run([(index, lambda: self.fn(**bound)) for index in np.ndindex(*grid)])
        finally:
            if scope:  # none with Triton 3.5, which leaves the language as the interpreter needs it
                scope.restore()

    shipped_call = GridExecutor.__call__
    for name, method in (("create_masked_load", load), ("create_masked_store", store), ("create_atomic_rmw", atomic)):
        setattr(InterpreterBuilder, name, method)
    GridExecutor.__call__ = call
    try:
        yield scheduler
    finally:
        GridExecutor.__call__ = shipped_call
        for name, method in shipped.items():
            setattr(InterpreterBuilder, name, method)


def without_the_wait(monkeypatch: Any) -> None:
    """Tells the readers of an exchange that everything has arrived."""
    from triton_lstm.kernels import exchange

    monkeypatch.setattr(exchange, "await_rows", lambda *_: 0)
