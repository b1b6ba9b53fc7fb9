"""Whether triton and other modules can be imported, and if not, why."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import signal
import sys
import threading
import traceback
from typing import Any

OLDEST_TRITON = (3, 5)
_importing = threading.RLock()
if hasattr(os, "register_at_fork"):  # a fork during another thread's import would deadlock the child
    os.register_at_fork(
        before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_importing.release
    )


def why_no_triton() -> str | None:
    """Why triton cannot be used: not installed, too old, broken, or another package of that name. None if it can."""
    for module, name in (("triton", "__version__"), ("triton.language", "cdiv"), ("triton.runtime", "JITFunction")):
        if reason := why_not_imported(module, name):
            return reason
    import triton

    if release(triton.__version__) < OLDEST_TRITON:
        return f"triton {triton.__version__} is too old: 3.5 or newer is needed"
    return None


@functools.cache
def why_not_imported(module: str, *names: str) -> str | None:
    """Why a module cannot be imported or lacks one of `names`; None if it can.

    A failure is cached, since a failed import may leave an inconsistent state. Only an import that a signal
    interrupted is retried.
    """
    package = module.partition(".")[0]
    try:
        with _importing:
            if package == "triton" and package not in sys.modules:  # submodules of an import that Ctrl-C interrupted
                for name in [n for n in sys.modules if n.startswith("triton.") and not n.startswith("triton._C")]:
                    del sys.modules[name]
            found = importlib.import_module(module)
        for name in names:
            getattr(found, name)
    except BaseException as error:  # a module may raise anything, SystemExit included
        if from_handler := _raised_by_signal_handler(error):
            raise from_handler from None
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            return f"{package} is not installed"
        try:
            lines = str(error).splitlines() or ["no message"]
        except Exception:
            lines = ["its message cannot be read"]
        what = f"the kernels with triton{_location('triton')}" if names == () else package + _location(package)
        return f"{what} cannot be used: {type(error).__name__}: {lines[0]}"
    return None


def _raised_by_signal_handler(error: BaseException | None) -> BaseException | None:
    """`error` or a cause of it, if Ctrl-C or a signal handler raised it rather than the module.

    Python wraps exceptions from __set_name__ in RuntimeError, and pybind11 wraps them in ImportError.
    """
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    while error is not None:
        frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
        if isinstance(error, KeyboardInterrupt) or not handlers.isdisjoint(frames):
            return error
        error = error.__cause__
    return None


def _code(handler: Any) -> Any:
    """The code object of a function, method, partial or callable object; None if there is none."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    if not callable(handler):  # signal.SIG_DFL, whose class is callable
        return None
    return getattr(handler, "__code__", None) or getattr(type(handler).__call__, "__code__", None)


def _location(package: str) -> str:
    """Where a package is installed, which reveals another one of that name; empty if unknown."""
    try:
        spec = importlib.util.find_spec(package)
    except Exception:
        return ""
    places = [] if spec is None else [spec.origin] if spec.has_location else list(spec.submodule_search_locations or [])
    return f" in {places[0]}" if places else ""


def release(version: object) -> tuple[int, ...]:
    """The first two numbers of a version; a part without a number counts as 0."""
    return _release(str(version))


@functools.cache
def _release(version: str) -> tuple[int, ...]:
    return tuple(int((re.match(r"\d{1,9}", part) or ["0"])[0]) for part in version.split(".")[:2])
