"""Loads, stores, atomics, and the matrices of ldmatrix and stmatrix."""

from __future__ import annotations

import numpy as np
import pytest

from .faults import Fault
from .kernel import Kernel
from .lines import kernel_of, run_lines

LANES = np.arange(32, dtype=np.uint32)
AT = "mad.lo.s64 %rd0, %rd98, {bytes}, %memory;"  # each thread's own address


# Bytes 0, 1, 2 and so on; a thread's part of them as registers, the first from the lowest address
@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(
    "vector, size",
    [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (4, 1), (2, 2), (4, 2), (2, 4), (4, 4), (2, 8), (8, 4), (4, 8)],
)
def test_vectors(vector, size, space):
    nbytes = vector * size
    memory = np.arange(32 * nbytes).astype(np.uint8)
    target = np.zeros_like(memory)
    names = [f"%d{i}" for i in range(vector)]
    registers, form = (names[0] if vector == 1 else f"{{{', '.join(names)}}}"), f"v{vector}." if vector > 1 else ""
    code = [AT.format(bytes=nbytes), f"ld.global.{form}b{8 * size} {registers}, [%rd0];"]
    if space == "shared":
        code.append(f"mad.lo.s32 %r0, %r98, {nbytes}, global_smem; st.shared.{form}b{8 * size} [%r0], {registers};")
        code += [f"mov.b{8 * max(size, 2)} {name}, 0;" for name in names]
        code.append(f"ld.shared.{form}b{8 * size} {registers}, [%r0];")
    found = run_lines("\n".join(code), {name: max(size, 2) for name in names}, {}, 32, 32 * nbytes, memory)
    kind = np.dtype(f"u{size}")
    for i, name in enumerate(names):
        assert found[name].tolist() == memory.view(kind)[i::vector].tolist()  # a byte is extended by zeros
    code[1:] = [f"mov.b{8 * max(size, 2)} {name}, %s{i};" for i, name in enumerate(names)]
    code.append(f"st.global.{form}b{8 * size} [%rd0], {registers};")
    inputs = {f"%s{i}": found[name] for i, name in enumerate(names)}
    run_lines("\n".join(code), {name: max(size, 2) for name in names}, inputs, 32, 0, target)
    assert target.tolist() == memory.tolist()


def test_offsets_and_constants():
    memory = np.arange(1, 41, dtype=np.uint32)
    code = AT.format(bytes=4) + "add.s64 %rd0, %rd0, 16; ld.global.b32 %d, [%rd0+16]; ld.global.b32 %r0, [%rd0 + -16];"
    assert run_lines(code + "sub.s32 %d, %d, %r0;", {"%d": 4}, {}, memory=memory)["%d"].tolist() == [8] * 32
    run_lines(AT.format(bytes=8) + "st.global.v2.b32 [%rd0], {-2, %r98};", {}, {}, memory=(pairs := memory.repeat(2)))
    assert pairs.tolist() == [x for lane in range(32) for x in (2**32 - 2, lane)] + memory.repeat(2).tolist()[64:]


@pytest.mark.parametrize(
    "kind, result", [("s8", 0xFFFFFF80), ("u8", 0x80), ("b8", 0x80), ("s16", 0xFFFF8180), ("u16", 0x8180)]
)
def test_a_wider_register_is_filled_by_the_sign_of_a_type(kind, result):
    memory = np.frombuffer(bytes([0x80, 0x81] * 32), np.uint8).copy()
    code = f"ld.global.{kind} %d, [%memory]; st.shared.{kind} [global_smem], %d; bar.sync 0; mov.b32 %d, 0;"
    found = run_lines(f"{code} ld.shared.{kind} %d, [global_smem];", {"%d": 4}, {}, 32, 4, memory)
    assert found["%d"].tolist() == [result] * 32


@pytest.mark.parametrize("kind, result", [("s32", 0xFFFFFFFF80000001), ("u32", 0x80000001), ("b32", 0x80000001)])
def test_so_it_is_by_a_parameter(kind, result):
    code = f"ld.param.{kind} %d, [snippet_param_0];"
    assert set(run_lines(code, {"%d": 8}, {"%s": np.array([0x80000001], np.uint32)})["%d"].tolist()) == {result}


def test_loads_and_stores_of_floats_do_not_change_their_bits():
    memory = np.array([0x7F800001, 0x00000001] * 16, np.uint32)
    code = AT.format(bytes=4) + "ld.global.f32 %d, [%rd0]; st.shared.f32 [%r0], %d; ld.shared.f32 %d, [%r0];"
    code = "mad.lo.s32 %r0, %r98, 4, global_smem;" + code
    assert run_lines(code, {"%d": 4}, {}, 32, 128, memory)["%d"].tolist() == memory.tolist()


def test_a_predicate_decides_which_threads_access_memory():
    memory = np.arange(32, dtype=np.uint32)
    code = ".reg .b32 %e; setp.ge.u32 %p0, %r98, 30; mov.b32 %e, 100;" + AT.format(bytes=4)
    load = code + "@%p0 ld.global.b32 %e, [%rd0]; mov.b32 %d, %e;"
    assert run_lines(load, {"%d": 4}, {}, memory=memory)["%d"].tolist() == [100] * 30 + [30, 31]
    load = code + "@%p0 add.s64 %rd0, %rd0, 4096; @!%p0 ld.global.b32 %e, [%rd0]; mov.b32 %d, %e;"  # no access outside
    assert run_lines(load, {"%d": 4}, {}, memory=memory)["%d"].tolist() == [*range(30), 100, 100]
    run_lines(code + "@%p0 st.global.b32 [%rd0], %e;", {}, {}, memory=memory)
    assert memory.tolist() == [*range(30), 100, 100]
    none = "setp.ne.u32 %p0, %r98, %r98; mov.b32 %d, 5; @%p0 ld.global.b32 %d, [0]; @%p0 st.shared.b32 [0], %d;"
    assert run_lines(none, {"%d": 4}, {}, memory=memory)["%d"].tolist() == [5] * 32


@pytest.mark.parametrize(
    "instruction, ordering, scope, cached",
    [
        ("ld.global.b32 %r0, [%rd0]", "weak", "sys", True),
        ("ld.global.cg.b32 %r0, [%rd0]", "weak", "sys", False),
        ("ld.global.cv.b32 %r0, [%rd0]", "weak", "sys", False),  # a cache's operator gives no order
        ("ld.volatile.global.b32 %r0, [%rd0]", "relaxed", "sys", False),
        ("ld.relaxed.gpu.global.b32 %r0, [%rd0]", "relaxed", "gpu", False),
        ("ld.global.gpu.acquire.b32 %r0, [%rd0]", "acquire", "gpu", False),  # in Triton's order
        ("st.global.wt.b32 [%rd0], %r0", "weak", "sys", False),
        ("st.volatile.global.b32 [%rd0], %r0", "relaxed", "sys", False),
        ("st.release.cta.global.b32 [%rd0], %r0", "release", "cta", False),
        ("atom.global.add.u32 %r0, [%rd0], %r1", "relaxed", "gpu", False),
        ("atom.global.acq_rel.sys.add.u32 %r0, [%rd0], %r1", "acq_rel", "sys", False),
        ("red.global.release.add.u32 [%rd0], %r1", "release", "gpu", False),
    ],
)
def test_the_order_that_an_access_gives(instruction, ordering, scope, cached):
    (access,) = filter(None, Kernel(kernel_of(f"{instruction};")).accesses)
    assert (access.ordering, access.scope, access.cached) == (ordering, scope, cached)


# The instruction, what memory had and has, and what thread 2 of three gets; one after the other, by number
ATOMICS = [
    ("atom.global.add.u32 %d, [%memory], %a", 10, 15, 13),  # 1, 2 and 2 are added
    ("atom.acquire.gpu.global.add.u32 %d, [%memory], %a", 0xFFFFFFFE, 3, 1),
    ("atom.global.max.s32 %d, [%memory], %a", 0xFFFFFFFF, 2, 2),
    ("atom.global.max.u32 %d, [%memory], %a", 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
    ("atom.global.min.s32 %d, [%memory], %a", 7, 1, 1),
    ("atom.global.and.b32 %d, [%memory], %a", 3, 0, 0),
    ("atom.global.or.b32 %d, [%memory], %a", 4, 7, 7),
    ("atom.global.xor.b32 %d, [%memory], %a", 4, 5, 7),
    ("atom.acq_rel.sys.global.exch.b32 %d, [%memory], %a", 9, 2, 2),
    ("atom.relaxed.gpu.global.cas.b32 %d, [%memory], 9, %a", 9, 1, 1),
    ("red.release.gpu.global.add.u32 [%memory], %a", 10, 15, 0),
]


@pytest.mark.parametrize("instruction, before, after, seen", ATOMICS)
def test_atomics(instruction, before, after, seen):
    memory = np.array([before], np.uint32)
    code = f"mov.b32 %d, 0; setp.lt.u32 %p0, %r98, 3; @%p0 {instruction};"
    found = run_lines(code, {"%d": 4}, {"%a": np.where(LANES == 0, 1, 2).astype(np.uint32)}, memory=memory)
    assert memory.tolist() == [after]
    assert found["%d"].tolist()[2:] == [seen] + [0] * 29


def places(count: int) -> list[int]:
    """Where in shared memory the rows of 16 bytes are: any order, with gaps."""
    return [16 * ((5 * row + 3) % 64) for row in range(8 * count)]


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count, trans):
    """Lane i has elements 2 * (i % 4) and the next of row i / 4 of each matrix; with trans, of its column i / 4."""
    rows = np.array(places(count))
    address = np.full(32, 1 << 20)  # only the first 8 * count threads' addresses count
    address[: rows.size] = 1024 + rows
    names = ", ".join(f"%d{i}" for i in range(count))
    form = f"sync.aligned.m8n8.x{count}{'.trans' if trans else ''}.shared.b16"
    words = np.arange(1024 // 4, dtype=np.uint32)
    words = 2 * words | (2 * words + 1) << 16  # halves 0, 1, 2 and so on
    code = """mad.lo.s64 %rd0, %rd98, 16, %memory; mad.lo.s32 %r0, %r98, 16, global_smem;
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0]; st.shared.v4.b32 [%r0], {%r1, %r2, %r3, %r4};
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0+512]; st.shared.v4.b32 [%r0+512], {%r1, %r2, %r3, %r4};
        bar.sync 0; """
    inputs = {"%a": address.astype(np.uint32)}
    found = run_lines(
        code + f"ldmatrix.{form} {{{names}}}, [%a];", {f"%d{i}": 4 for i in range(count)}, inputs, 32, 1024, words
    )
    for m in range(count):
        for lane in range(32):
            pair = [found[f"%d{m}"][lane] & 0xFFFF, found[f"%d{m}"][lane] >> 16]
            for j in range(2):
                row, column = (2 * (lane % 4) + j, lane // 4) if trans else (lane // 4, 2 * (lane % 4) + j)
                assert pair[j] == rows[8 * m + row] // 2 + column
    # The same registers to other rows, and back
    values = {f"%s{i}": found[f"%d{i}"] for i in range(count)}
    out = np.zeros_like(words)
    moved = address.astype(np.uint32)
    moved[: rows.size] = 1024 + rows[::-1]
    code += f"""stmatrix.{form} [%a], {{{", ".join(values)}}}; bar.sync 0;
        ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r0]; st.global.v4.b32 [%rd0], {{%r1, %r2, %r3, %r4}};
        ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r0+512]; st.global.v4.b32 [%rd0+512], {{%r1, %r2, %r3, %r4}};"""
    run_lines(code, {}, {"%a": moved} | values, 32, 1024, out)
    halves, before = out.view(np.uint16), np.zeros(512, np.uint16)
    for to, source in zip(rows[::-1], rows, strict=True):
        before[to // 2 : to // 2 + 8] = np.arange(source // 2, source // 2 + 8)
    assert halves.tolist() == before.tolist()


def test_an_access_of_shared_memory_that_was_not_asked_for_is_a_fault():
    with pytest.raises(Fault):
        run_lines("st.shared.b32 [global_smem+64], %r98;", {}, {}, shared=64)
