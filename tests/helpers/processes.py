"""Real processes of one process group on the CPU."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed

WORLD = 2
LIMIT = 600  # seconds for all of a function's work; a collective that waits for longer than a fifth of it fails


def in_processes(function, folder):
    """What function(rank) returns in each of WORLD processes, where Triton's interpreter runs the kernels, if it can.

    function: of a module, as other processes import it. If it returns a text, the test is skipped for that reason.
    folder: an empty one, for what they exchange.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        processes = torch.multiprocessing.spawn(_work, (str(folder), function), WORLD, join=False)
    try:
        end = time.monotonic() + LIMIT
        while not processes.join(timeout=1):
            assert time.monotonic() < end, f"the processes still run after {LIMIT} s"
    finally:
        for process in processes.processes:
            process.kill()
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    if isinstance(found[0], str):
        pytest.skip(found[0])
    return found


def _work(rank, folder, function):
    torch.set_num_threads(1)
    timeout = timedelta(seconds=LIMIT / 5)
    group = dict(rank=rank, world_size=WORLD, timeout=timeout)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", **group)
    torch.save(function(rank), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
