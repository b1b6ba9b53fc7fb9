"""Instructions: every row is worked out by hand from the PTX manual, on bits in hexadecimal digits."""

from __future__ import annotations

import numpy as np
import pytest

from .lines import evaluate, run_lines
from .test_numbers import rows

LANES = np.arange(32, dtype=np.uint32)

INTEGERS = """
add.s32       7fffffff 00000001 -> 80000000                  wraps
add.s16       7fff 0001 -> 8000
add.u64       ffffffffffffffff 0000000000000002 -> 0000000000000001
sub.u32       00000000 00000001 -> ffffffff
neg.s32       80000000 -> 80000000
abs.s32       fffffff9 -> 00000007
mul.lo.s32    00010001 00010001 -> 00020001
mul.lo.u64    ffffffffffffffff ffffffffffffffff -> 0000000000000001
mul.lo.s16    0100 0101 -> 0100
mul.hi.s32    80000000 80000000 -> 40000000
mul.hi.s32    ffffffff 00000002 -> ffffffff
mul.hi.u32    ffffffff ffffffff -> fffffffe
mul.hi.s64    8000000000000000 0000000000000002 -> ffffffffffffffff
mul.hi.u64    8000000000000000 0000000000000002 -> 0000000000000001
mul.wide.u16  ffff ffff -> fffe0001
mul.wide.s16  ffff ffff -> 00000001
mul.wide.s32  80000000 00000002 -> ffffffff00000000
mul.wide.u32  80000000 00000002 -> 0000000100000000
mad.lo.s32    00000003 fffffffe 00000007 -> 00000001
mad.hi.u32    ffffffff ffffffff 00000003 -> 00000001
mad.wide.u16  ffff ffff 0001ffff -> 00000000                 fffe0001 + 1ffff wraps
mad.wide.s32  ffffffff 00000004 0000000100000000 -> 00000000fffffffc
mad.lo.s64    ffffffffffffffff 0000000000000004 0000000000000003 -> ffffffffffffffff
div.s32       fffffff9 00000002 -> fffffffd                  -7 / 2 is -3, towards zero
div.s32       00000007 fffffffe -> fffffffd
div.s32       80000000 ffffffff -> 80000000
div.u32       fffffff9 00000002 -> 7ffffffc
div.s16       fff9 fffe -> 0003
div.s64       fffffffffffffff9 0000000000000002 -> fffffffffffffffd
rem.s32       fffffff9 00000002 -> ffffffff                  the sign of the dividend
rem.s32       00000007 fffffffe -> 00000001
rem.s32       80000000 ffffffff -> 00000000
rem.u64       fffffffffffffff9 000000000000000a -> 0000000000000009
and.b32       0ff0f00f 00ffff00 -> 00f0f000
or.b16        0f00 00f1 -> 0ff1
xor.b64       ffffffffffffffff 00000000ffffffff -> ffffffff00000000
not.b32       0000ffff -> ffff0000
and.pred      1 0 -> 0
or.pred       1 0 -> 1
xor.pred      1 1 -> 0
not.pred      0 -> 1
shl.b32       00000001 0000001f -> 80000000
shl.b32       00000001 00000020 -> 00000000                  from the width on: 0
shl.b32       ffffffff ffffffff -> 00000000
shl.b16       0001 0000000f -> 8000
shl.b16       0001 00000010 -> 0000
shl.b64       0000000000000001 00000020 -> 0000000100000000
shr.u32       80000000 0000001f -> 00000001
shr.b32       80000000 00000020 -> 00000000
shr.s32       80000000 0000001f -> ffffffff
shr.s32       80000000 00000028 -> ffffffff                  from the width on: the sign
shr.s32       40000000 00000028 -> 00000000
shr.u16       8000 0000000f -> 0001
shr.s64       8000000000000000 00000041 -> ffffffffffffffff
bfe.u32       abcd1234 00000008 00000008 -> 00000012
bfe.s32       00000f00 00000008 00000004 -> ffffffff
bfe.s32       00000700 00000008 00000004 -> 00000007
bfe.s32       ffffffff 00000004 00000000 -> 00000000         no bits
bfe.u32       80000000 0000001c 00000008 -> 00000008         beyond the top: 0
bfe.s32       80000000 0000001c 00000008 -> fffffff8         or the sign
bfe.s32       80000000 00000040 00000004 -> ffffffff
bfe.u32       80000001 00000100 00000120 -> 80000001         the lowest byte counts: 0 and 32
bfe.u32       80000001 00000100 00000104 -> 00000001
bfe.s64       00000000000000f0 00000004 00000004 -> ffffffffffffffff
bfe.u64       123456789abcdef0 00000020 00000010 -> 0000000000005678
prmt.b32      33221100 77665544 00003210 -> 33221100
prmt.b32      33221100 77665544 00007531 -> 77553311
prmt.b32      80ff7f01 00000000 0000ba98 -> ffff0000         the sign of each byte
prmt.b32      33221100 77e65544 ffff0e64 -> 00ffe644         of the selector, 16 bits count
selp.b32      00000001 00000002 1 -> 00000001
selp.f32      00000001 00000002 0 -> 00000002
selp.b16      0001 0002 1 -> 0001
selp.b64      0000000000000001 0000000000000002 0 -> 0000000000000002
mov.b32       12345678 -> 12345678
mov.pred      1 -> 1
"""

# 7fc00000 is NaN
COMPARISONS = """
setp.eq.s32   00000001 00000001 -> 1
setp.ne.b32   00000001 00000001 -> 0
setp.lt.s32   ffffffff 00000000 -> 1
setp.lt.u32   ffffffff 00000000 -> 0
setp.lo.u32   00000000 ffffffff -> 1
setp.ls.u32   00000001 00000001 -> 1
setp.hi.u32   ffffffff 00000000 -> 1
setp.hs.u32   00000000 00000001 -> 0
setp.ge.s16   8000 7fff -> 0
setp.gt.u16   8000 7fff -> 1
setp.le.s64   ffffffffffffffff 0000000000000000 -> 1
setp.eq.f32   80000000 00000000 -> 1                         -0 equals 0
setp.lt.f32   80000000 00000000 -> 0
setp.le.f32   ff800000 7f800000 -> 1
setp.eq.f32   7fc00000 7fc00000 -> 0
setp.ne.f32   7fc00000 3f800000 -> 0
setp.ne.f32   40000000 3f800000 -> 1
setp.ge.f32   7fc00000 3f800000 -> 0
setp.equ.f32  7fc00000 3f800000 -> 1
setp.equ.f32  40000000 3f800000 -> 0
setp.neu.f32  3f800000 3f800000 -> 0
setp.neu.f32  7fc00000 7fc00000 -> 1
setp.ltu.f32  7fc00000 3f800000 -> 1
setp.ltu.f32  3f800000 3f800000 -> 0
setp.leu.f32  3f800000 3f800000 -> 1
setp.leu.f32  40000000 3f800000 -> 0
setp.gtu.f32  3f800000 7fc00000 -> 1
setp.gtu.f32  3f800000 3f800000 -> 0
setp.geu.f32  3f800000 40000000 -> 0
setp.geu.f32  3f800000 7fc00000 -> 1
setp.num.f32  3f800000 7f800000 -> 1
setp.num.f32  3f800000 7fc00000 -> 0
setp.nan.f32  7fc00000 3f800000 -> 1
setp.nan.f32  3f800000 3f800000 -> 0
setp.lt.f64   bff0000000000000 3ff0000000000000 -> 1
setp.lt.f16   bc00 3c00 -> 1
setp.nan.bf16 7fc0 3f80 -> 1
"""


@pytest.mark.parametrize("opcode, operands, result", rows(INTEGERS + COMPARISONS))
def test_integers_and_comparisons(opcode, operands, result):
    assert evaluate(opcode, operands, len(result)) == [result]


CONSTANTS = [
    ("add.s32 %d, %a, -1;", 0xFFFFFFFF),
    ("or.b32 %d, %a, 0x80U;", 0x80),
    ("add.f32 %d, %a, 0f3F800000;", 0x3F800000),
    ("shl.b32 %d, 1, 4;", 0x10),
    ("shr.s32 %d, -16, 2;", 0xFFFFFFFC),
    ("shl.b32 %d, 1, 32;", 0),
    ("mov.u32 %d, %ntid.x;", 32),
    ("mov.b32 %d, global_smem;", 1024),  # where the emulator has shared memory
    ("mov.b16 %rs0, -2; cvt.s32.s16 %d, %rs0;", 0xFFFFFFFE),
    ("mov.pred %p0, -1; selp.b32 %d, 5, 6, %p0;", 5),
    # Registers in parts, the first of which are the lowest bits
    ("mov.b16 %rs0, 1; mov.b16 %rs1, 2; mov.b32 %d, {%rs0, %rs1};", 0x20001),
    ("mov.b32 {%rs0, %rs1}, 0x20001; cvt.u32.u16 %d, %rs1;", 2),
    ("mov.b64 %rd0, 0x1234567800000009; mov.b64 {_, %d}, %rd0;", 0x12345678),
    ("mov.b64 %rd0, {%a, 7}; shr.u64 %rd0, %rd0, 32; cvt.u32.u64 %d, %rd0;", 7),
    ("mov.b64 %rd0, 0x4444333322221111; mov.b64 {%rs0, %rs1, %rs2, %rs3}, %rd0; cvt.u32.u16 %d, %rs2;", 0x3333),
    ("{ .reg .b32 x; mov.b32 x, 3; add.s32 %d, x, x; }", 6),  # inline assembly
    # Predicates
    ("setp.eq.s32 %p0, %a, 1; mov.b32 %d, 7; @%p0 mov.b32 %d, 8;", 7),
    ("setp.eq.s32 %p0, %a, 1; mov.b32 %d, 7; @!%p0 mov.b32 %d, 8;", 8),
    ("setp.eq.s32 %p0, %a, 0; mov.b32 %d, 1; @%p0 bra L;\nmov.b32 %d, 2;\nL:", 1),
    ("bra.uni L;\nmov.b32 %d, 2;\nL: mov.b32 %d, 3;", 3),
]  # fmt: skip


@pytest.mark.parametrize("code, result", CONSTANTS)
def test_constants_parts_and_predicates(code, result):
    for a in (np.zeros(1, np.uint32), np.zeros(32, np.uint32)):
        assert run_lines(code, {"%d": 4}, {"%a": a})["%d"].tolist() == [result] * 32


def test_threads_where_a_predicate_is_set_change_and_others_do_not():
    code = "setp.lt.u32 %p0, %a, 3; mov.b32 %d, 100; @%p0 add.s32 %d, %a, 1; @!%p0 sub.s32 %d, %d, %a;"
    assert run_lines(code, {"%d": 4}, {"%a": LANES})["%d"].tolist() == [1, 2, 3, *range(97, 68, -1)]


def test_a_loop_that_threads_leave_one_by_one():
    code = "mov.b32 %d, 0;\nL: add.s32 %d, %d, 2; setp.lt.s32 %p0, %d, %a;\n@%p0 bra L;"
    found = run_lines(code, {"%d": 4}, {"%a": LANES})["%d"]
    assert found.tolist() == [max(2, lane + lane % 2) for lane in range(32)]
