"""Numbers: every row is worked out by hand from the PTX manual, on bits in hexadecimal digits."""

from __future__ import annotations

import pytest

from .lines import evaluate

# Floats, add to fma. 3f800000 is 1, 3f800001 its successor 1 + 2^-23, 33800000 2^-24
ARITHMETIC = """
add.f32           3f800000 33800000 -> 3f800000   a tie goes to even, down
add.rn.f32        3f800001 33800000 -> 3f800002   a tie goes to even, up
add.f32           3f800000 33800001 -> 3f800001   more than a tie
add.f32           7f800000 ff800000 -> 7fffffff   inf - inf: the NaN of the hardware
add.f32           7f800001 00000000 -> 7fffffff   any NaN: the same
add.f32           80000000 80000000 -> 80000000
sub.f32           3f800000 3f800000 -> 00000000
mul.f32           00800000 3f000000 -> 00400000   half the smallest normal number: nothing is flushed to zero
mul.f32           7f7fffff 40000000 -> 7f800000
add.f64           3ff0000000000000 3ca0000000000000 -> 3ff0000000000000   1 + 2^-53, a tie
add.f16           3c00 1000 -> 3c00   1 + 2^-11, a tie
add.f16           3c01 1000 -> 3c02
add.f16           7bff 4c00 -> 7c00   65504 + 16, half a step: to infinity
mul.f16           0001 3800 -> 0000   half of the smallest, a tie
add.bf16          3f80 3b80 -> 3f80   1 + 2^-8, a tie
add.bf16          3f81 3b80 -> 3f82
mul.bf16          7f80 0000 -> 7fff
add.f16x2         3c004000 3c003c00 -> 40004200   1 + 1 and 2 + 1
sub.bf16x2        3f804000 3f803f80 -> 00003f80   1 - 1 and 2 - 1
mul.f32x2         400000003f800000 4040000040400000 -> 40c0000040400000
sub.f32x2         400000007f800000 3f8000007f800000 -> 3f8000007fffffff
add.rn.f32.bf16   3f81 3f800000 -> 40008000   1.0078125 + 1
sub.rn.f32.f16    3e00 3f800000 -> 3f000000   1.5 - 1
fma.rn.f32        3f800001 3f7ffffe bf800000 -> a8800000   (1 + e)(1 - e) - 1 is -2^-46; with two roundings 0
fma.rn.f32        42c20000 4828e840 30800000 -> 4b800001   97 * 172961 is 2^24 + 1, a tie but for 2^-30
fma.rn.f32        42c20000 4828e840 b0800000 -> 4b800000
fma.rn.f32        42c20000 4828e840 00000000 -> 4b800000   the tie itself
fma.rn.f32        c2c20000 4828e840 b0800000 -> cb800001
fma.rn.f32        c2c20000 4828e840 30800000 -> cb800000
fma.rn.f32        1a000000 1a000000 00000000 -> 00000000   2^-150, half of the smallest
fma.rn.f32        1a000000 1a000001 00000000 -> 00000001
fma.rn.f32        1a000000 1a000000 00000001 -> 00000002   one and a half
fma.rn.f32        7f800000 00000000 3f800000 -> 7fffffff
fma.rn.f32        7f7fffff 40000000 ff800000 -> ff800000
fma.rn.f64        3ff0000000000001 3feffffffffffffe bff0000000000000 -> b970000000000000   -2^-104
fma.rn.f64        3ff0000080000000 3ff0000000300000 b740000000000001 -> 3ff0000080300001   a tie but for 2^-139
fma.rn.f16        3c01 3bff bc00 -> 0ffe   (1 + 2^-10)(1 - 2^-11) - 1 is 2^-11 - 2^-21
fma.rn.f16x2      3c014000 3bff4200 bc003c00 -> 0ffe4700   and 2 * 3 + 1
fma.rn.f32x2      400000003f800001 404000003f7ffffe 3f800000bf800000 -> 40e00000a8800000
div.full.f32      3f800000 40400000 -> 3eaaaaab
div.rn.f32        3f800000 80000000 -> ff800000
div.rn.f32        00000000 00000000 -> 7fffffff
div.rn.f64        3ff0000000000000 4008000000000000 -> 3fd5555555555555
neg.f32           00000000 -> 80000000
neg.f64           bff0000000000000 -> 3ff0000000000000
neg.f16           3c00 -> bc00
abs.f32           ff800000 -> 7f800000
abs.bf16          bf80 -> 3f80
sqrt.rn.f32       40000000 -> 3fb504f3
sqrt.rn.f32       bf800000 -> 7fffffff
rcp.rn.f32        40400000 -> 3eaaaaab
rcp.approx.f32    80000000 -> ff800000
rsqrt.approx.f32  40800000 -> 3f000000
rsqrt.approx.f32  00000000 -> 7f800000
rsqrt.approx.ftz.f32 00000001 -> 7f800000
rsqrt.approx.ftz.f32 40800000 -> 3f000000
ex2.approx.f32    3f000000 -> 3fb504f3
ex2.approx.f32    c3150000 -> 00000001   2^-149
ex2.approx.f32    ff800000 -> 00000000
ex2.approx.f32    43000000 -> 7f800000   2^128
ex2.approx.ftz.f32 3f000000 -> 3fb504f3
ex2.approx.ftz.f32 c3150000 -> 00000000  2^-149, subnormal
ex2.approx.ftz.f32 c2fc0000 -> 00800000  2^-126, not
ex2.approx.ftz.f32 80000001 -> 3f800000
"""

EXTREMES = """
min.f32           00000000 80000000 -> 80000000   -0 is below 0
min.f32           80000000 00000000 -> 80000000
max.f32           00000000 80000000 -> 00000000
max.f32           80000000 00000000 -> 00000000
min.f32           7fc00000 3f800000 -> 3f800000   of a NaN and a number, the number
max.f32           bf800000 ffc00000 -> bf800000
max.f32           7fc00001 ffc00000 -> 7fffffff
min.NaN.f32       7fc00000 3f800000 -> 7fffffff
max.NaN.f32       3f800000 7f800001 -> 7fffffff
max.NaN.f32       3f800000 40000000 -> 40000000
max.NaN.f32       80000000 00000000 -> 00000000
min.f32           40000000 3f800000 7fc00000 -> 3f800000   of three
max.NaN.f32       40000000 3f800000 7fc00000 -> 7fffffff
max.f64           fff0000000000000 7ff8000000000000 -> fff0000000000000
max.f16           fc00 7e00 -> fc00
min.NaN.f16x2     7e003c00 3c003800 -> 7fff3800
max.bf16x2        7fc0bf80 3f80c000 -> 3f80bf80
max.NaN.bf16      8000 0000 -> 0000
min.s32           80000000 00000001 -> 80000000
min.u16x2         ffff0001 fffe7fff -> fffe0001   of both halves
min.s16x2         80000001 00017fff -> 80000001
max.u16x2         ffff0001 fffe7fff -> ffff7fff
min.u32           80000000 00000001 -> 00000001
max.s16           ffff 0001 -> 0001
max.u16           ffff 0001 -> ffff
min.s64           ffffffffffffffff 0000000000000000 -> ffffffffffffffff
max.u64           ffffffffffffffff 0000000000000000 -> ffffffffffffffff
"""

CONVERSIONS = """
cvt.rn.bf16.f32   3f808000 -> 3f80   1 + 2^-8, a tie to even, down
cvt.rn.bf16.f32   3f818000 -> 3f82   up
cvt.rn.bf16.f32   3f808001 -> 3f81
cvt.rn.bf16.f32   bf817fff -> bf81
cvt.rn.bf16.f32   7f7fffff -> 7f80   beyond the largest: infinity
cvt.rn.bf16.f32   ff800000 -> ff80
cvt.rn.bf16.f32   7f800001 -> 7fff   NaN, whatever its bits
cvt.rn.bf16.f32   ffffffff -> 7fff
cvt.rn.bf16.f32   00008000 -> 0000   half of the smallest
cvt.rn.bf16.f32   00018000 -> 0002
cvt.rn.bf16x2.f32 3f818000 c0000000 -> 3f82c000   the first is the upper half
cvt.rn.f16x2.f32  3f803000 7fc00000 -> 3c027fff
cvt.f32.bf16      bf81 -> bf810000
cvt.f32.bf16      0001 -> 00010000
cvt.rn.f16.f32    3f801000 -> 3c00   1 + 2^-11, a tie to even, down
cvt.rn.f16.f32    3f803000 -> 3c02   up
cvt.rn.f16.f32    3f801001 -> 3c01
cvt.rn.f16.f32    477fefff -> 7bff   a little less than 65520
cvt.rn.f16.f32    477ff000 -> 7c00   65520, a tie of 65504 and 2^16
cvt.rn.f16.f32    33000000 -> 0000   2^-25, half of the smallest
cvt.rn.f16.f32    b3000001 -> 8001
cvt.rn.f16.f32    33c00000 -> 0002   one and a half
cvt.rn.f16.f32    7f800001 -> 7fff
cvt.f32.f16       0001 -> 33800000   2^-24
cvt.f32.f16       fc00 -> ff800000
cvt.f32.f16       fc01 -> 7fffffff
cvt.rna.tf32.f32  3f801000 -> 3f802000   1 + 2^-11, a tie: away from zero
cvt.rna.tf32.f32  bf803000 -> bf804000
cvt.rna.tf32.f32  3f800fff -> 3f800000
cvt.rna.tf32.f32  7f7fffff -> 7f800000
cvt.rna.tf32.f32  ff800000 -> ff800000
cvt.rna.tf32.f32  ff800001 -> 7fffffff
cvt.f64.f32       00000001 -> 36a0000000000000
cvt.rn.f32.f64    3ff0000010000000 -> 3f800000   1 + 2^-24, a tie
cvt.rn.f32.f64    3ff0000030000000 -> 3f800002
cvt.rn.f32.f64    fff8000000000000 -> 7fffffff
cvt.rn.f32.s32    01000001 -> 4b800000   2^24 + 1, a tie
cvt.rn.f32.s32    01000003 -> 4b800002
cvt.rn.f32.s32    ffffffff -> bf800000
cvt.rn.f32.u32    ffffffff -> 4f800000
cvt.rn.f32.u16    ffff -> 477fff00
cvt.rn.f32.u64    8000008000000001 -> 5f000001   more than a tie by 1, which float64 would lose
cvt.rn.f32.s64    8000000000000000 -> df000000
cvt.rn.f64.s64    7fffffffffffffff -> 43e0000000000000
cvt.rzi.s32.f32   3fffffff -> 00000001
cvt.rzi.s32.f32   bfffffff -> ffffffff   -1.99 is -1
cvt.rzi.s32.f32   4f000000 -> 7fffffff   2^31 is limited
cvt.rzi.s32.f32   cf800000 -> 80000000
cvt.rzi.s32.f32   ff800000 -> 80000000
cvt.rzi.s32.f32   7fc00000 -> 00000000   NaN
cvt.rzi.u32.f32   bf800000 -> 00000000
cvt.rzi.u32.f32   4f7fffff -> ffffff00
cvt.rzi.u32.f32   4f800000 -> ffffffff
cvt.rzi.u16.f32   47800000 -> ffff
cvt.rzi.s64.f32   5f000000 -> 7fffffffffffffff
cvt.rzi.s64.f32   df000000 -> 8000000000000000
cvt.rzi.s64.f32   7fc00000 -> 8000000000000000   NaN, where a type has 64 bits
cvt.rzi.u64.f32   7fc00000 -> 8000000000000000
cvt.rzi.u64.f32   5f7fffff -> ffffff0000000000
cvt.rzi.u64.f32   5f800000 -> ffffffffffffffff
cvt.rzi.u64.f32   ff800000 -> 0000000000000000
cvt.rzi.s32.f64   7ff8000000000000 -> 80000000
cvt.rzi.s32.f64   c1e0000000000000 -> 80000000
cvt.s32.s8        000000ff -> ffffffff   of a wider register, the lower bits
cvt.u32.u8        000001ff -> 000000ff
cvt.s16.s8        0080 -> ff80
cvt.u16.u32       00018000 -> 8000
cvt.u32.u16       ffff -> 0000ffff
cvt.s32.u16       ffff -> 0000ffff
cvt.u32.s16       8000 -> ffff8000
cvt.s64.s32       80000000 -> ffffffff80000000
cvt.u64.u32       80000000 -> 0000000080000000
cvt.u32.u64       123456789abcdef0 -> 9abcdef0
cvt.u8.u32        000001ff -> 00ff   into a wider register: with zeros
cvt.s8.s32        00000080 -> ff80   or with the sign
"""


def rows(table: str) -> list[tuple[str, str, str]]:
    """An opcode, its operands, and the result; what follows is a remark."""
    found = []
    for line in filter(None, table.splitlines()):
        what, _, result = line.partition(" -> ")
        opcode, operands = what.split(maxsplit=1)
        found.append((opcode, operands, result.split()[0]))
    return found


@pytest.mark.parametrize("opcode, operands, result", rows(ARITHMETIC + EXTREMES + CONVERSIONS))
def test_float_instructions(opcode, operands, result):
    assert evaluate(opcode, operands, len(result)) == [result]
