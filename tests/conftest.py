"""The test device: a GPU with compiled kernels if there is one, else the CPU with Triton's interpreter, or with the
emulated GPU that PTX_GPU names."""

import contextlib
import csv
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import COMPILED, EMULATED
from tracing import untraced

from triton_lstm.dispatch import no_kernel_for
from triton_lstm.system import machine

pytest_plugins = ["training", "ranks", "benches", "tuned", "recorded", "last_runs"]  # their fixtures

# One thread unless the environment sets more: the workers of pytest-xdist share the cores
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
# For runs in the background or under nohup: tests send these signals
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    number = getattr(signal, name, None)
    if number and threading.current_thread() is threading.main_thread() and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)
for name in ("COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):  # output is compared
    os.environ.pop(name, None)
    os.unsetenv(name)  # pytest imports readline, which sets two of them outside of os.environ
with contextlib.suppress(ImportError):
    import hypothesis

    hypothesis.settings.register_profile("any machine", deadline=None)  # no test is timed: machines may be busy
    hypothesis.settings.load_profile("any machine")
if not COMPILED:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of a kernel
with torch.device("meta"):  # its first use stores which functions it is for: not those of _poisoned_memory
    torch.empty(0)


class Outcomes:
    """For `make gpu-test`, of which a stopped run is of use: writes a CSV with every test's outcome, duration and the
    reason of a failure or a skip, and shows failures when they happen."""

    def __init__(self, path: Path, terminal: Any) -> None:
        self.terminal = terminal
        self.commit = machine.commit()
        self.file = open(path, "w", newline="", buffering=1)  # noqa: SIM115 - a row is on disk as soon as it is known
        self.rows = csv.writer(self.file, lineterminator="\n")
        self.rows.writerow(("test", "outcome", "seconds", "reason", "commit"))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(report, "not collected", "")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._add(report, report.outcome, f"{report.duration:.3f}")

    def _add(self, report: pytest.CollectReport | pytest.TestReport, outcome: str, seconds: str) -> None:
        self.rows.writerow((report.nodeid, outcome, seconds, reason_of(report), self.commit))
        if report.failed:
            self.terminal.ensure_newline()
            self.terminal.section(report.nodeid, "_")
            self.terminal.write_line(report.longreprtext)

    def pytest_unconfigure(self) -> None:
        self.file.close()


def reason_of(report: pytest.CollectReport | pytest.TestReport) -> str:
    """The message of a failure or a skip on one line, at most 200 characters of it."""
    found: Any = report.longrepr
    if isinstance(found, tuple):  # of a skip: path, line, message
        text = found[2]
    elif crash := getattr(found, "reprcrash", None):
        text = crash.message
    else:  # of a module, or a worker of pytest-xdist that died
        text = (str(found or "").strip().splitlines() or [""])[-1]
    return " ".join(text.split())[:200]


def pytest_report_header() -> str:
    """The CPU features that PyTorch uses, on which the last bits depend."""
    return torch.__config__.parallel_info() + "CPU capability: " + torch.backends.cpu.get_cpu_capability()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--csv", type=Path, metavar="FILE", help="write every test's outcome there, and show failures at once"
    )


def pytest_make_parametrize_id(val: Any) -> str | None:
    """A test with a text of megabytes has a name that CSVs and logs can hold."""
    return f"{val[:100]}..." if isinstance(val, str) and len(val) > 200 else None


@pytest.hookimpl(trylast=True)  # there is a terminal then
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--csv") and not hasattr(config, "workerinput"):  # of pytest-xdist, only the controller writes
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        config.pluginmanager.register(Outcomes(config.getoption("--csv"), terminal))


INTERPRETED = os.environ.get("TRITON_INTERPRET")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    """No test changes how kernels run for the tests after it in the same process."""
    yield
    found = os.environ.get("TRITON_INTERPRET")
    if found != INTERPRETED:
        if INTERPRETED is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = INTERPRETED
        raise AssertionError(f"TRITON_INTERPRET is {found} after this test: use monkeypatch.setenv")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of the kernels. Skips, with the reason, if they cannot run, as with some versions of NumPy."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if not EMULATED and (reason := no_kernel_for(device.type, torch.float32)):
        pytest.skip(str(reason))
    return device


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Skips, with the reason, if Triton's interpreter cannot run the kernels; on a GPU they are compiled."""
    if EMULATED:
        pytest.skip("the kernels are compiled")
    if reason := no_kernel_for("cpu", torch.float64):
        pytest.skip(str(reason))


@pytest.fixture
def precise(device: torch.device) -> tuple[torch.dtype, dict[str, float]]:
    """float64 if the kernels support it, and a matching tolerance."""
    if COMPILED:
        return torch.float32, dict(rtol=2e-2, atol=2e-2)
    return torch.float64, dict(rtol=1e-10, atol=1e-12)


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, float32 is compared at full float32 precision on both sides, except in test_tf32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New floating-point buffers are filled with NaN, so that an element that is never written cannot look correct."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() and not out.requires_grad else out

        return wrapper

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _unmeasured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`make coverage` measures no test that is marked so, nor the processes that it starts."""
    if request.node.get_closest_marker("unmeasured") is None:
        yield
        return
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    with untraced():
        yield


@pytest.fixture(autouse=True)
def _emulated_gpu(_poisoned_memory: None) -> Iterator[None]:
    """With PTX_GPU: the machine that runs the kernels.

    PTX_SEED, PTX_WEAK=1: how its launches run, and whether memory is weak; or PTX_SCHEDULE, as a report gives it.
    """
    if not EMULATED:
        yield
        return
    from ptx.gpu import gpu
    from ptx.schedule import Schedule

    options: dict[str, Any] = dict(seed=int(os.environ.get("PTX_SEED", 0)), weak=os.environ.get("PTX_WEAK") == "1")
    if text := os.environ.get("PTX_SCHEDULE"):
        options["schedule"] = Schedule.parse(text)
    with gpu(EMULATED, shrinks=True, **options):
        yield
