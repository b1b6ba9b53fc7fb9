"""What the emulator does not know is an error that names the instruction and its place, and never skipped."""

from __future__ import annotations

import re

import numpy as np
import pytest

from .faults import UnknownInstructionError
from .kernel import Kernel
from .lines import kernel_of, run_lines
from .parser import parse

KNOWN = """
.version 8.7
.target sm_90a
.address_size 64

	// .globl	k     // -- Begin function k
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u32 k_param_1
)
.reqntid 64
.maxnreg 128
{
	.reg .pred 	%p<3>;
	.reg .b32 	%r<4>;
	.reg .b64 	%rd<2>;
	.loc	1 10 0                          // forward.py:10:0
$L__func_begin0:
// %bb.0:
	ld.param.b64 	%rd1, [k_param_0];
	.pragma "nounroll";
	.loc	1 12 31                         // forward.py:12:31
$L__BB0_1: // in Loop
	// begin inline asm
	mov.u32 %r1, 0x0;
	@!%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 8 ];
	// end inline asm
	{ .reg .b32 x; mov.b32 x, 1; add.s32 %r1, x, x; }
	.loc	2 7 9, function_name $L__info_string0, inlined_at 1 14 3
	@%p1 bra 	$L__BB0_1;
	ret;
$L__func_end0:
}
	.file	1 "/home/someone/forward.py"
	.file	2 "exchange.py"
	.section	.debug_info
	{
.b8 1
	}
"""


def test_a_kernels_text():
    text = parse(KNOWN)
    assert (text.name, text.threads, text.parameters) == ("k", 64, {"k_param_0": 8, "k_param_1": 4})
    assert text.registers == {"%p": 0, "%r": 4, "%rd": 8, "x": 4}
    assert text.labels == {"$L__func_begin0": 0, "$L__BB0_1": 1, "$L__func_end0": 7}
    assert [str(instruction) for instruction in text.code] == [
        "ld.param.b64 %rd1, [k_param_0]",
        "mov.u32 %r1, 0x0",
        "@!%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 8 ]",
        "mov.b32 x, 1",
        "add.s32 %r1, x, x",
        "@%p1 bra $L__BB0_1",
        "ret",
    ]
    assert [instruction.source for instruction in text.code] == (
        ["forward.py:10", *["forward.py:12"] * 4, *["exchange.py:7"] * 2]
    )
    assert KNOWN.splitlines()[text.code[5].line - 1].strip() == "@%p1 bra 	$L__BB0_1;"
    Kernel(KNOWN)


@pytest.mark.parametrize(
    "old, new",
    [
        (".reqntid 64", ".reqntid 64, 2, 1"),
        (".maxnreg 128", ".reqnctapercluster 2, 1, 1"),
        (".maxnreg 128", ".maxntid 128"),
        (".param .u32 k_param_1", ".param .align 64 .b8 k_param_1[128]"),
        ("	.pragma", "	.local .align 8 .b8 	__local_depot0[16];\n	.pragma"),
        ("	.pragma", "	.shared .b32 x;\n	.pragma"),
        ("	.pragma", "$L_t: .branchtargets $L__BB0_1;\n	.pragma"),
        ("	ret;", "	call.uni (retval0), f, (param0);\n	ret;"),
        ("	ret;", "	call.uni\n	f,\n	(\n	);\n	ret;"),
        ("	ret;", "	mov.u32 %r1\n	ret;"),
        ("	ret;", "	trap;\n	ret;"),
        ("	ret;", "	@%p1 ret;\n	ret;"),
        ("	ret;\n", ""),
        ("	ret;", "$L__BB0_1:	ret;"),
        ("	ret;", "	bra 	$L__BB0_9;\n	ret;"),
        ("	ret;", "	{ .reg .b64 x; mov.b64 x, 1; }\n	ret;"),  # another x
        ("	.section", "}\n.visible .entry other()\n.reqntid 32\n{\n	ret;\n	.section"),
    ],
)
def test_directives_that_are_not_known(old, new):
    assert old in KNOWN
    with pytest.raises(UnknownInstructionError):
        Kernel(KNOWN.replace(old, new))


# Instructions that exist in PTX, or could be taken for some that are known. %p, %rs, %r, %rd: of 0, 2, 4 and 8 bytes
UNKNOWN = """
add.sat.s32 %r0, %r1, %r2           add.cc.s32 %r0, %r1, %r2        addc.s32 %r0, %r1, %r2
add.ftz.f32 %r0, %r1, %r2           add.rz.f32 %r0, %r1, %r2        add.sat.f32 %r0, %r1, %r2
add.u16x2 %r0, %r1, %r2             add.s32 %r0, %r1                add.s32 %r0, %r1, %r2, %r3
add.s32 %r0, %rd1, %r2               add.s64 %r0, %rd1, %rd2           add.f64 %rd0, %rd1, 0f3F800000
add.s32 %r0, %r1, x                 add.s32 %r0, %z1, %r2           add.s8 %rs0, %rs1, %rs2
add.f8 %rs0, %rs1, %rs2                add %r0, %r1, %r2               add.rn.s32 %r0, %r1, %r2
add.rn.rn.f32 %r0, %r1, %r2         mul.rn.f32.bf16 %r0, %rs1, %r2   add.rn.f32.f32 %r0, %r1, %r2
mul.s32 %r0, %r1, %r2               mul.lo.f32 %r0, %r1, %r2        mul.wide.s64 %rd0, %rd1, %rd2
mul24.lo.s32 %r0, %r1, %r2          mul.wide.s32 %r0, %r1, %r2      mad.lo.cc.s32 %r0, %r1, %r2, %r3
mad.hi.sat.s32 %r0, %r1, %r2, %r3   mad.rn.f32 %r0, %r1, %r2, %r3   fma.rn.ftz.f32 %r0, %r1, %r2, %r3
fma.rz.f32 %r0, %r1, %r2, %r3       fma.rn.relu.f16 %rs0, %rs1, %rs2, %rs3  fma.rn.bf16 %rs0, %rs1, %rs2, %rs3
fma.rn.f32.bf16 %r0, %rs1, %rs2, %r3  fma.rn.f32 %r0, %r1, %r2        div.approx.ftz.f32 %r0, %r1, %r2
div.rn.f16 %rs0, %rs1, %rs2            rem.f32 %r0, %r1, %r2           neg.ftz.f32 %r0, %r1
abs.f16x2 %r0, %r1                  rsqrt.approx.f64 %rd0, %rd1        ex2.approx.f16 %rs0, %rs1
sqrt.rz.f32 %r0, %r1                rcp.rn.approx.f32 %r0, %r1       sqrt.f32 %r0, %r1
div.full.f64 %rd0, %rd1, %rd2          fma.f32 %r0, %r1, %r2, %r3      div.f32 %r0, %r1, %r2
neg.rn.f32 %r0, %r1                 tanh.approx.f32 %r0, %r1        lg2.approx.f32 %r0, %r1
min.ftz.f32 %r0, %r1, %r2           min.xorsign.abs.f32 %r0, %r1, %r2   min.relu.s32 %r0, %r1, %r2
max.NaN.s32 %r0, %r1, %r2           min.s32 %r0, %r1, %r2, %r3      min.u8x4 %r0, %r1, %r2
and.s32 %r0, %r1, %r2               not.b32 %r0, %r1, %r2           cnot.b32 %r0, %r1
lop3.b32 %r0, %r1, %r2, %r3, 128    shl.s32 %r0, %r1, 1             shl.b32 %r0, %r1, %rd2
shr.bf16 %rs0, %rs1, 1   shr.b8 %rs0, %rs1, 1                  shf.l.wrap.b32 %r0, %r1, %r2, 3 bfe.u16 %rs0, %rs1, 1, 2
bfi.b32 %r0, %r1, %r2, 3, 4         clz.b32 %r0, %r1                popc.b32 %r0, %r1
brev.b32 %r0, %r1                   bfind.u32 %r0, %r1              szext.wrap.s32 %r0, %r1, 3
sad.s32 %r0, %r1, %r2, %r3          dp4a.s32.s32 %r0, %r1, %r2, %r3 prmt.b32.f4e %r0, %r1, %r2, %r3
setp.lt.ftz.f32 %p0, %r1, %r2       setp.lt.s32 %p0|%p1, %r1, %r2   setp.lt.and.s32 %p0, %r1, %r2, %p1
setp.lt.b32 %p0, %r1, %r2           setp.lo.s32 %p0, %r1, %r2       setp.nan.s32 %p0, %r1, %r2
setp.lt.f16x2 %p0, %r1, %r2         setp.lo.f32 %p0, %r1, %r2       setp.lt.s32 %r0, %r1, %r2
setp.s32 %p0, %r1, %r2              set.lt.u32.s32 %r0, %r1, %r2    slct.s32.s32 %r0, %r1, %r2, %r3
selp.b32 %r0, %r1, %r2, !%p0        selp.b32 %r0, %r1, %r2, %r3     selp.f16 %rs0, %rs1, %rs2, %p0     mov.tf32 %r0, %r1   selp.pred %p0, %p1, %p2, %p3
mov.b128 %rd0, {%rd1, %rd2}            mov.b32 %r0, %clock             mov.u32 %r0, %tid.y
mov.b32 %r0, %r1+4                  mov.b32 %r0, {%rs0, %rs1, %rs2}    mov.u64 %rd0, %tid.x
mov.b32 {%rs0, %rs1}, %rd0             mov.b64 %rd0, L                  cvta.to.global.u64 %rd0, %rd1
cvt.sat.s32.f32 %r0, %r1            cvt.rni.s32.f32 %r0, %r1        cvt.s32.f32 %r0, %r1
cvt.rz.f16.f32 %rs0, %r1             cvt.f16.f32 %rs0, %r1            cvt.rn.relu.bf16.f32 %rs0, %r1
cvt.rn.satfinite.bf16x2.f32 %r0, %r1, %r2   cvt.rn.bf16x2.f32 %r0, %r1  cvt.rn.bf16.f32 %rs0, %r1, %r2
cvt.ftz.f32.f16 %r0, %rs1            cvt.f32.f32 %r0, %r1            cvt.rn.tf32.f32 %r0, %r1
cvt.rn.f32.s8 %r0, %rs1              cvt.s32.s64 %r0, %r1            cvt.sat.u8.u32 %rs0, %r1
cvt.pack.sat.s16.s32 %r0, %r1, %r2  cvt.rn.e4m3x2.f32 %rs0, %r1, %r2 cvt.s64.s32 %rd0, %rs1
cvt.u32.u32.u32 %r0, %r1            cvt.u32 %r0, %r1                cvt.rn.f32.pred %r0, %p0
ld.b32 %r0, [%rd1]                   ld.const.b32 %r0, [%rd1]         ld.local.b32 %r0, [%rd1]
ld.global.nc.b32 %r0, [%rd1]         ld.global.L1::evict_last.b32 %r0, [%rd1]  ldu.global.b32 %r0, [%rd1]
ld.shared::cluster.b32 %r0, [%r1]   ld.shared.b32 %r0, [%rd1]        ld.global.b32 %r0, [%r1]
ld.global.v2.b32 %r0, [%rd1]         ld.global.v2.b32 {%r0, %r1, %r2}, [%rd1]  ld.global.b128 %rd0, [%rd1]
ld.global.b32 %r0, %rd1              ld.global.b64 %r0, [%rd1]        ld.global.f16x2 %r0, [%rd1]
ld.release.gpu.global.b32 %r0, [%rd1]    ld.acquire.global.b32 %r0, [%rd1]    ld.gpu.global.b32 %r0, [%rd1]
ld.volatile.relaxed.gpu.global.b32 %r0, [%rd1]   ld.global.wt.b32 %r0, [%rd1]  ld.mmio.relaxed.sys.global.b32 %r0, [%rd1]
ld.global.b32 %r0, [%rd1], %rd2       ld.global.b32 %r0, [%rd1+x]      ld.param.b32 %r0, [snippet_param_0]
ld.param.b64 %rd0, [snippet_param_1]   ld.param.b64 %rd0, [snippet_param_0+8]    ld.param.v2.b32 {%r0, %r1}, [snippet_param_0]
st.acquire.gpu.global.b32 [%rd1], %r0    st.global.b64 [%rd1], %r0    st.global.v4.b32 [%rd1], {%r0, %r1}
st.async.weak.shared::cluster.b32 [%r0], %r1, [%r2]     st.global.ca.b32 [%rd1], %r0     st.param.b32 [x], %r0
st.bulk.weak.shared::cta [%r1], %rd0, 0  red.async.relaxed.cluster.global.add.u32 [%rd0], %r1, [%rd2]
atom.shared.add.u32 %r0, [%r1], %r2     atom.global.add.f32 %r0, [%rd1], %r2     atom.add.u32 %r0, [%rd1], %r2
atom.global.inc.u32 %r0, [%rd1], %r2     atom.global.cas.b32 %r0, [%rd1], %r2     atom.global.add.b32 %r0, [%rd1], %r2
atom.global.max.b32 %r0, [%rd1], %r2     atom.global.volatile.add.u32 %r0, [%rd1], %r2    atom.global.cas.b16 %rs0, [%rd1], %rs1, %rs2
atom.global.v2.add.u32 {%r0, %r1}, [%rd1], {%r2, %r3}    atom.global.add.noftz.f16 %rs0, [%rd1], %rs2
red.global.add.f32 [%rd1], %r2       red.global.exch.b32 [%rd1], %r2  red.global.add.u32 %r0, [%rd1], %r2
multimem.red.relaxed.sys.global.add.u32 [%rd1], %r0      cp.async.cg.shared.global [%r0], [%rd1], 16
cp.async.wait_group 0               cp.async.bulk.commit_group      prefetch.global.L2 [%rd1]
ldmatrix.sync.aligned.m8n8.x4.b16 {%r0, %r1, %r2, %r3}, [%r4]   ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r0}, [%r4]
ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r0, %r1}, [%r4]   ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%r0, %r1, %r2}, [%r4]
stmatrix.sync.aligned.m16n8.x1.trans.shared.b8 [%r0], {%r1}     stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r0], {%r1}
movmatrix.sync.aligned.m8n8.trans.b16 %r0, %r1          mapa.shared::cluster.u32 %r0, %r1, 1
shfl.bfly.b32 %r0, %r1, 1, 31       shfl.sync.bfly.b32 %r0, %r1, 1, 31, 0xffff  shfl.sync.bfly.b32 %r0, %r1, 1, %r2, -1
@%p0 shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1     shfl.sync.swap.b32 %r0, %r1, 1, 31, -1  shfl.sync.bfly.b64 %rd0, %rd1, 1, 31, -1
redux.sync.min.f32 %r0, %r1, %r2    redux.sync.and.s32 %r0, %r1, %r2    @%p0 redux.sync.add.s32 %r0, %r1, %r2
vote.sync.uni.pred %p0, %p1, -1     vote.any.pred %p0, %p1          vote.sync.any.pred %p0, %p1, 1
vote.sync.ballot.b32 %p0, %p1, -1   activemask.b32 %r0              match.any.sync.b32 %r0, %r1, -1
elect.sync %r0|%p0, -1              brx.idx %r0, L                  bra L2
bra.uni L, %r0                      exit                            ret.uni
bar.sync 1                          bar.sync 0, 64                  bar.arrive 0, 64
bar.red.popc.u32 %r0, 0, %p0        bar                             @%p0 bar.sync 0
bar.warp.sync 1                     @%p0 bar.warp.sync -1           barrier.cluster.arrive
barrier.cta.red.popc.u32 %r0, 0, %p0    membar                      membar.proxy.alias
fence.acquire.gpu                   fence.acq_rel                   fence.acq_rel.gpu.global
fence.proxy.async.global            fence.proxy.tensormap::generic.release.gpu  @%p0 fence.proxy.async
fence.mbarrier_init.release.cluster     griddepcontrol.wait         nanosleep.u32 32
mbarrier.init.shared.b64 [%r0], 1   tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r0}, [%r1]  setmaxnreg.inc.sync.aligned.u32 240
mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r0, %r1}, {%r2, %r3, %r4, %r5}, {%r6, %r7}, {%r0, %r1}
mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 {%r0, %r1, %r2, %r3}, {%r4, %r5, %r6, %r7}, {%r8, %r9}, {%r0, %r1, %r2, %r3}
mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32 {%r0, %r1, %r2, %r3}, {%r4, %r5, %r6, %r7}, {%r8, %r9}, {%r0, %r1, %r2, %r3}
mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%r8, %r9}, {%r0, %r1, %r2, %r3}
mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r0, %r1, %r2, %r3}, {%r4, %r5, %r6, %r7}, {%r8, %r9}, {%r0, %r1, %r2, %r3}
mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r0, %r1}, {%r2}, {%r3}, {%r0, %r1}
mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%r8, %r9}, {%r0, %r1, %r2, %r3}, %r7, 0
wgmma.fence.sync                    wgmma.wait_group.sync.aligned   @%p0 wgmma.fence.sync.aligned
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r0, %r1, %r2, %r3}, %rd0, %rd1, %p0, -1, 1, 0, 0
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r0, %r1, %r2, %r3}, %rd0, %rd1, %p0, 1, 1
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r0, %r1}, %rd0, %rd1, %p0, 1, 1, 0, 0
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r0, %r1, %r2, %r3}, %rd0, %rd1, %p0, 1, 1, 0, 2
wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {%r0, %r1}, %rd0, %rd1, %p0, 1, 1, 0, 0
wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%r0, %r1, %r2, %r3}, %rd0, %rd1, %p0, 1, 1
wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r0, %r1, %r2, %r3}, %rd0, %rd1, %p0, 1, 1, 0, 1
wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.bf16.bf16 {%r0, %r1, %r2, %r3}, %rd0, %rd1, %r4, 0, %p0, 1, 1, 0, 0
"""  # noqa: E501


@pytest.mark.parametrize("instruction", re.split(r"\s{2,}|\n", UNKNOWN.strip()))
def test_unknown_instructions_are_errors_with_their_place(instruction):
    opcode = re.sub(r"^@%p0 ", "", instruction).split()[0]
    ptx = kernel_of(f"L:\n{instruction};")
    with pytest.raises(UnknownInstructionError) as error:
        Kernel(ptx)
    place = f"(PTX line {ptx.splitlines().index(f'{instruction};') + 1}: {instruction})"
    assert opcode in str(error.value) and place in str(error.value)


def test_a_reduction_of_a_part_of_a_warp_is_an_error():
    with pytest.raises(UnknownInstructionError, match=r"redux\.sync\.add\.s32"):
        run_lines("mov.b32 %r0, 255; redux.sync.add.s32 %d, %a, %r0;", {"%d": 4}, {"%a": np.zeros(32, np.uint32)})
