"""What a device can run of a plan, and why not the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from triton_lstm.devices import KIB, Device

if TYPE_CHECKING:
    from triton_lstm.plan import Plan

REGISTERS = 255  # a thread's; `launch` allows no more
RESERVED_BYTES = 1024  # of a processor's shared memory, for each program on it


def shared_bytes(itemsize: int, hidden_size: int, backward: bool, plan: Plan) -> int:
    """Estimate of the on-chip memory of one program: weights, one chunk of rows, and room to change layouts.

    An upper bound in all compiled kernels on NVIDIA; on AMD weights may lie in registers instead. One program alone has
    the gradients of all four gates for rows, each of them a chunk.
    """
    alone = plan.exchange == "none"
    columns = plan.block_h * (1 if backward else 4)
    length = plan.sum_length(hidden_size, backward) if plan.resident else plan.block_k
    rows = plan.block_b * plan.block_k * (4 if backward and alone else 1)
    product = plan.block_b * columns * plan.slices * 4
    gates = plan.block_b * 4 * plan.block_h * itemsize
    return (length * columns + rows) * itemsize + max(product, gates)


def co_resident(device: Device, itemsize: int, hidden_size: int, backward: bool, plan: Plan) -> int:
    """How many programs run at once for certain: at least one a processor, more where their needs are known to fit."""
    if device.backend != "cuda":
        return device.processors
    needed = shared_bytes(itemsize, hidden_size, backward, plan) + RESERVED_BYTES
    by_shared = (device.shared_bytes + RESERVED_BYTES) // needed
    by_registers = device.registers // ((REGISTERS + 1) * plan.warps * device.warp_size)
    return device.processors * max(1, min(by_shared, by_registers))


def why_not(device: Device, itemsize: int, hidden_size: int, backward: bool, plan: Plan) -> str | None:
    """None if `device` can run the plan and should, else the reason in words."""
    problem = (itemsize, hidden_size, backward, plan)
    spills = _spills(*problem)
    reason = why_impossible(device, *problem) or _narrow(device, *problem)
    return reason or (f"it would spill registers: {spills}" if spills else None)


def why_impossible(device: Device, itemsize: int, hidden_size: int, backward: bool, plan: Plan) -> str | None:
    """The reason why a plan cannot run at all, not even slowly."""
    if plan.exchange == "flag" and device.backend == "hip":
        return "the flag exchange needs volatile loads, which the compiler for AMD drops"
    if plan.exchange == "none" and plan.block_h < hidden_size:
        return f"one program of {plan.block_h} units cannot hold a layer of {hidden_size}"
    if plan.exchange == "none" and not (plan.resident and plan.slices == 1 and plan.block_k == plan.block_h):
        return "one program holds all weights, in one chunk"
    shared = shared_bytes(itemsize, hidden_size, backward, plan)
    if shared > device.shared_bytes:
        return f"it needs {shared / KIB:.0f} KiB of shared memory, a program has {device.shared_bytes / KIB:.0f} KiB"
    if device.backend == "cuda" and (REGISTERS + 1) * plan.warps * device.warp_size > device.registers:
        return f"{plan.warps} warps with {REGISTERS} registers a thread are more than a processor has"
    programs, room = plan.grid(hidden_size)[0], co_resident(device, itemsize, hidden_size, backward, plan)
    if plan.one_launch and plan.exchange != "none" and programs > room:
        return f"its {programs} programs wait for each other, and only {room} run at once"
    return None


def _narrow(device: Device, itemsize: int, hidden_size: int, backward: bool, plan: Plan) -> str | None:
    stored = min(itemsize, 4)
    polled = plan.block_b * plan.block_k * stored // (device.warp_size * plan.warps)
    if plan.exchange != "none" and polled < plan.poll_bytes(stored, hidden_size, backward):
        return f"a chunk of {plan.block_k} has less than 16 bytes for each thread to load"
    return None


def _spills(itemsize: int, hidden_size: int, backward: bool, plan: Plan) -> str | None:
    """What of a plan takes more registers of a thread than it did in compiled kernels that spilled none."""
    if plan.exchange == "none":
        held = 4 * plan.block_h**2 * itemsize * plan.block_b // 16
        return "it holds all weights" if held > 16 * KIB * plan.warps else None
    if itemsize == 8 and (plan.warps < 8 or plan.block_b > 16):
        return "three products with fewer than 8 warps or more than 16 rows"
    threads, size, stored = 32 * plan.warps, itemsize / 4, min(itemsize, 4)
    columns = plan.block_h * (1 if backward else 4)
    copies = 2 if itemsize == 8 else 1  # of all numbers, in "tf32x3"
    sums = copies * plan.block_b * columns * plan.slices / threads
    units = copies * plan.block_b * plan.block_h / threads
    rows = size * plan.block_b * plan.block_k / 32 / plan.slices
    weights = 0.0 if plan.resident else size * plan.block_k * columns / threads
    most_sums, most_units, most_rows = (16, 2, 32) if plan.slices > 1 else (32, 4, 128)
    if plan.slices > 1 and not plan.resident:
        most_units, most_rows = 1, 16
    elif plan.slices > 1 and itemsize >= 4:
        most_units = 1
    elif itemsize == 8:
        most_rows = 64
        most_units = 2 if backward and plan.resident else 4
    elif itemsize == 4 and plan.block_b >= 64:
        most_rows = 32
    if sums > most_sums:
        return f"{sums:.0f} sums"
    if units > most_units:
        return f"{units:.0f} units"
    chunks = plan.sum_length(hidden_size, backward) // plan.block_k
    many = chunks > (7 if backward else 8) or plan.poll_bytes(stored, hidden_size, backward) < 16
    if plan.block_b >= 64 and plan.resident and many:  # all chunks are loaded before the first is used
        return f"{chunks} chunks of {plan.block_b} rows"
    if rows > most_rows or rows * plan.slices > 32 * plan.warps:
        return f"{rows:.0f} numbers of a chunk of rows"
    return f"{weights:.0f} numbers of a chunk of weights" if weights > 48 else None
