"""Processes that train one model: a pool of them that runs many commands, and the real torchrun."""

import contextlib
import io
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from child import python_path
from training import TINY

SECONDS = 300  # until a test fails


class Result(NamedTuple):
    """What a process ended with."""

    status: Any
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _serve(connection: Any) -> None:
    """Runs commands in a process of the pool."""
    import torch.distributed

    from triton_lstm.cli import main as cli

    while True:
        try:
            arguments, environment, folder, before = connection.recv()
        except EOFError:  # the tests have ended
            return
        os.chdir(folder)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, environment))
            out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            try:
                if before:
                    stack.enter_context(before())
                status: Any = cli.main(arguments)
            except SystemExit as error:
                status = error.code
            except BaseException:
                status = traceback.format_exc()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            for stream in (out, err):
                stream.flush()
            texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
        connection.send((status, *texts))


class Pool:
    """`size` processes, each of which is a rank of whatever is run."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.size = size
        self._connections, self._processes = [], []
        for _ in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,))
            process.start()
            self._connections.append(here)
            self._processes.append(process)

    def run(self, arguments: list[str], folder: Path, each: Any = None, **environment: str) -> list[Result]:
        """Runs the command `train` in all processes.

        each: a function from the rank to further arguments, or to a context in which that rank runs the command.
        """
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(self.size)}
        for rank, connection in enumerate(self._connections):
            own, before = [], None
            if each is not None:
                found = each(rank)
                own, before = (found, None) if isinstance(found, list) else ([], found)
            command = ["train", *map(str, [*arguments, *own])]
            connection.send((command, {**common, "RANK": str(rank), **environment}, str(folder), before))
        results = []
        for connection in self._connections:
            assert connection.poll(SECONDS), f"no answer for {SECONDS} s"
            results.append(Result(*connection.recv()))
        return results

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(SECONDS / 10)  # it writes down what coverage has seen
            process.kill()


@pytest.fixture(scope="module")
def pools():
    """Pools by size, for all tests of a module."""
    made: dict[int, Pool] = {}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("CUDA_VISIBLE_DEVICES", "")  # as many processes as we like, on any machine

        def pool(size):
            if size not in made:
                made[size] = Pool(size)
            return made[size]

        yield pool
    for pool in made.values():
        pool.close()


@pytest.fixture
def ranks(pools, tmp_path, text):
    """Trains with so many processes, PyTorch's own LSTM and TINY sizes, unless a run is resumed; returns their
    results."""

    def call(size, *args, each=None, backend="torch", **environment):
        sizes = [] if "--resume" in args else [*TINY, "--device", "cpu", "--text", text]
        environment["TRITON_LSTM_BACKEND"] = backend
        return pools(size).run([*sizes, *args], tmp_path, each, **environment)

    return call


@pytest.fixture
def torchrun(tmp_path, text):
    """Starts torchrun with so many processes, in a process group of its own."""
    started = []

    def start(size, *args, restarts=0):
        sizes = [] if "--resume" in args else [*TINY, "--device", "cpu", "--text", str(text)]
        command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={size}", f"--max-restarts={restarts}"]
        environment = os.environ | {"TRITON_LSTM_BACKEND": "torch", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = python_path()
        pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        arguments = [*command, "-m", "triton_lstm", "train", *sizes, *map(str, args)]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", *arguments], cwd=tmp_path, env=environment, start_new_session=True, **pipes
            )
        )
        return started[-1]

    yield start
    for process in started:
        for worker in workers(process):
            with contextlib.suppress(OSError):
                os.kill(worker, 9)
        process.kill()
        process.communicate()


def workers(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started, by rank."""
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    except OSError:
        return []
    found = {}
    for child in map(int, children):
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks = [int(item.removeprefix(b"RANK=")) for item in environment if item.startswith(b"RANK=")]
            if ranks:
                found[ranks[0]] = child
    return [found[rank] for rank in sorted(found)]
