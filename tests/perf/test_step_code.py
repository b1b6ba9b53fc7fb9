"""The parser of machine code, against encodings that were taken apart by hand."""

import pytest
from listing import code, listing

from triton_lstm.perf.step.machine_code import NONE, disassemble, parse, why_no_tools

# The begin of a kernel for sm_90, as nvdisasm prints it
PRINTED = """
//--------------------- .text.lstm_forward_kernel --------------------------
	.section	.text.lstm_forward_kernel,"ax",@progbits
lstm_forward_kernel:
.text.lstm_forward_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;                                       /* 0x00000a00ff017b82 */
                                                                                                /* 0x000e220000000800 */
        /*0010*/                   S2R R0, SR_TID.X ;                                           /* 0x0000000000007919 */
                                                                                                /* 0x000e620000002100 */
        /*0020*/                   ULDC.64 UR4, c[0x0][0x218] ;                                 /* 0x0000860000047ab9 */
                                                                                                /* 0x000fe20000000a00 */
        /*0030*/                   CS2R R8, SRZ ;                                               /* 0x0000000000087805 */
                                                                                                /* 0x000fe4000001ff00 */
//--------------------- .nv.shared.other --------------------------
//--------------------- .text.other --------------------------
        /*0000*/                   EXIT ;                                                       /* 0x000000000000794d */
                                                                                                /* 0x000fea0003800000 */
"""


def control(instruction):
    return instruction.stall, instruction.yields, instruction.write, instruction.read, instruction.waits


def test_control_bits():
    """0xe22 is 0000 111 000 1 0001 0: no wait, read 7, write 0, yield, stall 1; likewise the others."""
    first = parse(PRINTED)
    assert [instruction.name for instruction in first] == ["LDC", "S2R", "ULDC.64", "CS2R"]  # of the first kernel only
    assert control(first[0]) == (1, True, 0, NONE, ())
    assert control(first[1]) == (1, True, 1, NONE, ())  # 0xe62
    assert control(first[2]) == (1, True, NONE, NONE, ())  # 0xfe2
    assert control(first[3]) == (2, True, NONE, NONE, ())  # 0xfe4


def test_scoreboards():
    """001001 010 101 0 1101 0 is 0x955a."""
    lines = PRINTED.replace("0x000e220000000800", "0x00955a0000000800")
    assert control(parse(lines)[0]) == (13, False, 5, 2, (0, 3))
    assert control(code("LDC R1, c[0x0][0x28] | s13 w5 r2 ?03")[0]) == (13, False, 5, 2, (0, 3))  # what listing writes


def test_jumps_go_to_labels():
    found = code(
        "loop:", "@!P0 BRA end", "BRA.U UP0, `(.L_loop)", "BRA loop", "end:", "@P1 CALL.REL.NOINC loop", "EXIT"
    )
    assert [i.target for i in found] == [3, 0, 0, 0, None]
    assert [i.falls_through for i in found] == [True, True, False, True, False]
    assert [i.guard for i in found] == ["!P0", "", "", "P1", ""]


@pytest.mark.parametrize(
    "text, kind, width, wavefronts",
    [
        ("LDG.E.128.STRONG.SYS R48, desc[UR12][R52.64]", "load", 16, 4),
        ("LDG.E.U16.STRONG.GPU R48, desc[UR12][R52.64]", "load", 2, 1),
        ("LDG.E.64 R48, desc[UR12][R52.64]", "load", 8, 2),
        ("STG.E desc[UR12][R40.64], R33", "store", 4, 1),
        ("LDSM.16.MT88.4 R4, [R2]", "shared_load", 2, 4),
        ("HMMA.16816.F32.BF16 R92, R80, R78, R92", "mma", 4, 1),
        ("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR56], RZ, !UPT", "wgmma", 4, 1),
        ("MEMBAR.ALL.GPU", "fence", 4, 1),
        ("MEMBAR.ALL.CTA", "control", 4, 1),  # orders a program's own threads only
        ("REDG.E.ADD.STRONG.GPU desc[UR12][R146.64], R13", "atomic", 4, 1),
        ("IMAD.WIDE.U32 R40, R156, 0x1800, R166", "imad", 4, 1),
        ("ULEA UR4, UR7, UR4, 0x18", "uniform", 4, 1),
        ("LOP3.LUT R54, R48.reuse, 0xffff, RZ, 0xc0, !PT", "alu", 4, 1),
        ("LDL R3, [R1+0x8]", "local", 4, 1),
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR10]", "tcgen05", 4, 1),
    ],
)
def test_kinds(text, kind, width, wavefronts):
    (found,) = code(text)
    assert (found.kind, found.width, found.wavefronts) == (kind, width, wavefronts)
    assert found.strong == ("STRONG" in text and kind == "load")


def test_nothing_is_no_code():
    assert parse("") == [] and parse(listing()) == []


@pytest.mark.skipif(why_no_tools() is not None, reason=str(why_no_tools()))
def test_what_is_no_cubin_is_said():
    with pytest.raises(ValueError, match="no machine code: "):
        disassemble(b"nothing")
