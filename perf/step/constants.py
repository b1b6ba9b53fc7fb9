"""Every number that the model assumes, in cycles where nothing else is said.

Sources, by letter:
P  public micro-benchmarks of H100s, or of A100s where there are none, rounded; not looked up again one by one
D  NVIDIA's documents: white papers, programming guide's throughput tables
A  assumed: nothing public was found, or it differs by more than a few percent between sources
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Constants:
    """The values of record, of an H100; used for every GPU that there is a model of."""

    mhz: float = 1755.0  # A: of the processors; measured were 1980 in this project's benchmarks
    # Memory
    l2: float = 270.0  # P: a load that L2 serves, from issue to register
    memory: float = 650.0  # P: a load of a line that nobody has touched
    port: float = 64.0  # D: bytes a cycle from L2 into one processor; fewer while all read at once
    sector: float = 32.0  # D: bytes that a load of one element brings
    seen: float = 250.0  # A: from a store's issue until a load at L2 finds it
    seen_spread: float = 60.0  # A: plus 0 to this, by the distance between two programs' processors
    jitter: float = 25.0  # A: standard deviation of a program's step, for what the model does not know
    fence: float = 500.0  # A: MEMBAR.GPU, until all earlier stores are seen
    atomic: float = 540.0  # A: one that returns a value; two trips
    # Shared memory and what goes the same way
    shared_load: float = 29.0  # P
    matrix_load: float = 33.0  # P: LDSM
    shuffle: float = 24.0  # P
    reduce: float = 22.0  # A: REDUX
    local: float = 33.0  # A: a spilled register from the first cache
    constant: float = 32.0  # A: LDC that hits
    register: float = 25.0  # A: S2R, S2UR
    operands_read: float = 14.0  # A: until a load or store has read its registers
    barrier: float = 22.0  # P: after the last warp has come
    issue_memory: float = 2.0  # D: cycles between two of such instructions, per scheduler
    # Arithmetic: latency, and cycles between two instructions of a warp's 32 threads on a scheduler's lanes
    special: float = 20.0  # A: MUFU
    issue_special: float = 8.0  # D: 4 lanes
    convert: float = 22.0  # A: F2F and the like
    issue_convert: float = 8.0  # D: 4 lanes
    issue_integer: float = 2.0  # D: 16 lanes
    issue_imad: float = 2.0  # D: 16 lanes
    issue_mma: float = 6.5  # P: m16n8k16 of 16 bits at the rate that mma.sync reaches
    issue_mma_tf32: float = 6.5  # P: m16n8k8
    wgmma_a: float = 16.0  # D: a 64x16 tile of 16 bits read at 128 bytes a cycle
    wgmma_done: float = 20.0  # A: after the last one
    # Instructions: each scheduler's own cache
    lines: float = 32  # A: of 128 bytes, the least recently used one goes first
    fetch: float = 0.0  # A: of a line that is not in it; 0: not modelled


H100 = Constants()
# What brings the model near this project's measured times: chosen by hand; perf/README.md says what it may stand for
FITTED = dataclasses.replace(H100, mhz=1980.0, port=24.0, seen=650.0, jitter=200.0, fetch=20.0)
