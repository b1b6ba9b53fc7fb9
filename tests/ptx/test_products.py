"""Matrix products: operands are put where the PTX manual says, in formulas of their own, and products are exact."""

from __future__ import annotations

import numpy as np
import pytest

from .faults import UnknownInstructionError
from .lines import run_lines

Array = np.ndarray


def matrix(seed: int, *shape: int) -> Array:
    """Small integers, whose products every type holds exactly."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def bits(kind: str, x: Array) -> Array:
    """tf32: with bits below its own, which a tensor core does not see."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16).astype(np.uint32)
    whole = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return whole >> 16 if kind == "bf16" else whole | np.where(x == 0, 0, 0x1ABC).astype(np.uint32)


def registers(kind: str, x: Array, place, count: int, threads: int) -> list[Array]:
    """count registers of x[place(thread, element)] for each thread; of 16 bits, two to a register, the first lower."""
    elements = count * (1 if kind == "tf32" else 2)
    found = [bits(kind, np.array([x[place(thread, i)] for thread in range(threads)])) for i in range(elements)]
    if kind == "tf32":
        return found
    return [low | high << 16 for low, high in zip(found[::2], found[1::2], strict=True)]


def named(prefix: str, values: list[Array]) -> tuple[str, dict[str, Array]]:
    names = [f"%{prefix}{i}" for i in range(len(values))]
    return "{" + ", ".join(names) + "}", dict(zip(names, values, strict=True))


# "Matrix fragments for mma": (row, column) of element i, by groupID g = lane / 4 and threadID_in_group t = lane % 4
A = {
    ("16", 16): lambda g, t, i: (g + (8 if i in (2, 3, 6, 7) else 0), 2 * t + i % 2 + (8 if i >= 4 else 0)),
    ("16", 8): lambda g, t, i: (g + (8 if i >= 2 else 0), 2 * t + i % 2),
    ("tf32", 8): lambda g, t, i: (g + (8 if i in (1, 3) else 0), t + (4 if i >= 2 else 0)),
    ("tf32", 4): lambda g, t, i: (g + (8 if i == 1 else 0), t),
}
B = {
    ("16", 16): lambda g, t, i: (2 * t + i % 2 + (8 if i >= 2 else 0), g),
    ("16", 8): lambda g, t, i: (2 * t + i, g),
    ("tf32", 8): lambda g, t, i: (t + 4 * i, g),
    ("tf32", 4): lambda g, t, i: (t, g),
}


def c_place(thread: int, i: int) -> tuple[int, int, int]:
    """Warp, row, column."""
    return thread // 32, thread % 32 // 4 + (8 if i >= 2 else 0), 2 * (thread % 4) + i % 2


@pytest.mark.parametrize("kind, k", [("bf16", 8), ("bf16", 16), ("f16", 8), ("f16", 16), ("tf32", 4), ("tf32", 8)])
def test_mma(kind, k):
    a, b, c = matrix(1, 2, 16, k), matrix(2, 2, k, 8), matrix(3, 2, 16, 8)
    form = ("tf32" if kind == "tf32" else "16", k)
    count = 2 * k // (4 if kind == "tf32" else 8)  # 16 * k elements in 32 lanes
    a_names, a_values = named(
        "a", registers(kind, a, lambda n, i: (n // 32, *A[form](n % 32 // 4, n % 4, i)), count, 64)
    )
    b_names, b_values = named(
        "b", registers(kind, b, lambda n, i: (n // 32, *B[form](n % 32 // 4, n % 4, i)), count // 2, 64)
    )
    c_values = [np.array([c[c_place(n, i)] for n in range(64)]).view(np.uint32) for i in range(4)]
    c_names, c_values = named("c", c_values)
    opcode = f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32"
    code = f"{opcode} {{%d0, %d1, %d2, %d3}}, {a_names}, {b_names}, {c_names};"
    found = run_lines(code, {f"%d{i}": 4 for i in range(4)}, a_values | b_values | c_values, 64)
    d = a @ b + c
    for i in range(4):
        assert found[f"%d{i}"].view(np.float32).tolist() == [d[c_place(n, i)] for n in range(64)]


def test_mma_of_float64():
    a, b, c = (matrix(seed, *shape).astype(np.float64) for seed, shape in enumerate([(8, 4), (4, 8), (8, 8)]))
    lanes = np.arange(32)
    g, t = lanes // 4, lanes % 4
    values = {"%a": a[g, t], "%b": b[t, g], "%c0": c[g, 2 * t], "%c1": c[g, 2 * t + 1]}
    found = run_lines(
        "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d0, %d1}, {%a}, {%b}, {%c0, %c1};",
        {"%d0": 8, "%d1": 8},
        {name: np.ascontiguousarray(x).view(np.uint64) for name, x in values.items()},
    )
    for i in range(2):
        assert found[f"%d{i}"].view(np.float64).tolist() == (a @ b + c)[g, 2 * t + i].tolist()


def test_mma_gives_the_hardwares_nan():
    lanes = np.arange(32)
    a = np.where(lanes == 0, 0x7F817FC0, 0).astype(np.uint32)  # row 0 of A has NaN
    names = "{%d0, %d1, %d2, %d3}, {%a, %a, %z, %z}, {%z, %z}, {%z, %z, %z, %z}"
    code = f"mov.b32 %z, 0; mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {names};"
    found = run_lines(".reg .b32 %z; " + code, {f"%d{i}": 4 for i in range(4)}, {"%a": a})
    for i in range(4):  # %a is row 0 (first two) and row 8 (last two)
        assert found[f"%d{i}"].tolist() == [0x7FFFFFFF] * 4 + [0] * 28


# wgmma. A swizzled row of `width` bytes is divided into 16 bytes, which change places by the row's number in its eight
SWAPPED = {16: lambda r: 0, 32: lambda r: r // 4 % 2, 64: lambda r: r // 2 % 4, 128: lambda r: r % 8}
MODES = {16: 0, 128: 1, 64: 2, 32: 3}


class Tile:
    """An operand (rows, k) in shared memory at `start`; rows are of A or B, "MN-major" are those that are transposed.

    width: of a swizzled row, 16 for none. skip: bytes of k before it in the swizzled rows.
    """

    def __init__(self, kind: str, x: Array, start: int, width: int, transposed: bool, skip: int = 0) -> None:
        self.x, self.width, self.transposed, self.skip, self.start = x, width, transposed, skip, start
        self.kind, self.size = kind, 4 if kind == "tf32" else 2
        lines = x.shape[1] if transposed else x.shape[0]  # rows of memory
        eights = 16 * 8 if width == 16 else 8 * width
        self.stride = 2 * eights  # with a gap, so that it counts
        self.leading = self.stride * (lines // 8) + (0 if width == 16 else 8 * width)
        if width == 16 and transposed:
            self.stride, self.leading = self.leading, self.stride
        self.descriptor = (1024 + start + skip) >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32
        self.descriptor |= MODES[width] << 62

    def address(self, row: int, k: int) -> int:
        line, at = (k, row * self.size) if self.transposed else (row, k * self.size + self.skip)
        chunk, byte = at % self.width // 16, at % 16
        block = at // self.width  # beyond a swizzled row, or 16 bytes without: the next one
        if self.width == 16 and self.transposed:  # without a swizzle the two offsets change their roles
            return self.start + line // 8 * self.leading + block * self.stride + line % 8 * 16 + byte
        place = (chunk ^ SWAPPED[self.width](line % 8)) * 16 + byte
        return self.start + line // 8 * self.stride + block * self.leading + line % 8 * self.width + place

    def store(self, image: Array) -> None:
        elements = bits(self.kind, self.x)
        view = image.view(np.uint32 if self.size == 4 else np.uint16)
        for row, k in np.ndindex(*self.x.shape):
            view[self.address(row, k) // self.size] = elements[row, k]


def wgmma(kind: str, a: Tile | Array, b: Tile, c: Array, scale_d: str = "1") -> Array:
    """D (64, n), of a product over B's k."""
    n, k = b.x.shape
    image = np.zeros(1 << 15, np.uint8)
    b.store(image)
    inputs = {"%y": np.full(1, b.descriptor, np.uint64)}
    if isinstance(a, Tile):
        a.store(image)
        inputs["%x"] = np.full(1, a.descriptor, np.uint64)
        first = "%x"
    else:
        form = A["tf32" if kind == "tf32" else "16", k]

        def place(thread: int, i: int) -> tuple[int, int]:
            row, column = form(thread % 32 // 4, thread % 4, i)
            return 16 * (thread // 32) + row, column

        first, values = named("a", registers(kind, a, place, 4, 128))
        inputs |= values
    names = [f"%d{i}" for i in range(n // 2)]

    def d_place(thread: int, i: int) -> tuple[int, int]:
        return 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (thread % 4) + i % 2

    for i, name in enumerate(names):
        inputs[name] = np.array([c[d_place(thread, i)] for thread in range(128)]).view(np.uint32)
    trans = [t.transposed for t in (a, b) if isinstance(t, Tile)] if kind != "tf32" else []
    operands = f"{{{', '.join(names)}}}, {first}, %y, {scale_d}, 1, 1{''.join(f', {int(t)}' for t in trans)}"
    copy = [
        f"ld.global.b32 %r0, [%rd0+{512 * i}]; st.shared.b32 [%r1+{512 * i}], %r0;" for i in range(image.size // 512)
    ]
    code = (
        "mad.lo.s64 %rd0, %rd98, 4, %memory; mad.lo.s32 %r1, %r98, 4, global_smem;",
        *copy,
        "fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;",
        f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind} {operands};",
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
    )
    found = run_lines("\n".join(code), dict.fromkeys(names, 4), inputs, 128, image.size, image.view(np.uint32))
    d = np.zeros((64, n), np.float32)
    for i, name in enumerate(names):
        for thread in range(128):
            d[d_place(thread, i)] = found[name].view(np.float32)[thread]
    return d


WGMMA = [
    # type, n, A's swizzle (None: in registers) and whether it is transposed, B's, bytes of k before both
    ("bf16", 8, None, False, 128, False, 0),
    ("bf16", 16, None, False, 64, True, 0),
    ("f16", 32, None, False, 32, False, 0),
    ("tf32", 24, None, False, 128, False, 32),
    ("bf16", 32, 128, False, 128, False, 96),
    ("f16", 8, 64, False, 32, False, 0),
    ("bf16", 16, 32, False, 64, False, 0),
    ("f16", 64, 16, False, 16, False, 0),
    ("tf32", 16, 64, False, 64, False, 32),
    ("tf32", 8, 16, False, 32, False, 0),
    ("bf16", 128, 128, True, 128, True, 0),
    ("f16", 64, 64, True, 64, True, 0),
    ("bf16", 32, 32, True, 32, True, 0),
    ("f16", 24, 16, True, 16, True, 0),
    ("bf16", 192, 128, False, 128, True, 0),
]  # fmt: skip


@pytest.mark.parametrize("kind, n, a_width, a_transposed, b_width, b_transposed, skip", WGMMA)
def test_wgmma(kind, n, a_width, a_transposed, b_width, b_transposed, skip):
    k = 8 if kind == "tf32" else 16
    a, b, c = matrix(1, 64, k), matrix(2, n, k), matrix(3, 64, n)
    first = a if a_width is None else Tile(kind, a, 0, a_width, a_transposed, skip)
    second = Tile(kind, b, 1 << 14, b_width, b_transposed, skip)
    assert wgmma(kind, first, second, c).tolist() == (a @ b.T + c).tolist()
    assert wgmma(kind, first, second, c, "0").tolist() == (a @ b.T).tolist()


def test_a_descriptor_with_a_base_offset_is_an_error():
    b = Tile("bf16", matrix(2, 8, 16), 0, 128, False)
    b.descriptor |= 1 << 49
    with pytest.raises(UnknownInstructionError, match=r"descriptor 0x4.*wgmma\.mma_async"):
        wgmma("bf16", matrix(1, 64, 16), b, matrix(3, 64, 8))
