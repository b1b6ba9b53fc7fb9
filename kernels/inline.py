"""Inline PTX: what the compiler must not move, and waits of single threads, for which Triton has no words.

LAYER is a Layer of launch.py, TILE a plan's Tile. No type of it is given below: Triton refuses functions that refer to
typing.Any where it is no class, as in Python 3.10.
"""

import triton
import triton.language as tl
from triton.runtime import JITFunction

from triton_lstm.planning.plan import Tile

COMPILED = tl.constexpr(isinstance(tl.cdiv, JITFunction))  # or interpreted, where every load is there at once


@triton.constexpr_function
def waits_by_thread(layer) -> bool:
    """Whether each thread waits for itself, which takes no barrier of all warps; a wait with a limit has to say so."""
    return COMPILED.value and layer.BACKEND == "cuda" and not layer.SPIN_LIMIT


@triton.constexpr_function
def looks_by_thread(layer) -> bool:
    """Whether each thread looks whether what it has loaded is there."""
    return COMPILED.value and layer.BACKEND == "cuda" and not layer.SPIN_LIMIT and layer.EXCHANGE == "flag"


@triton.jit
def here(x, LAYER: tl.constexpr):
    """x, which was loaded before other things that take time, to be looked at from here on.

    Where its user wants another layout than memory, the compiler would change it right after the load, and wait for
    device memory there. It cannot move it across an instruction that it does not know.
    """
    if COMPILED and LAYER.BACKEND == "cuda":
        tl.static_assert(x.dtype.primitive_bitwidth <= 32, "a register has 32 bits")
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth  # elements in a register
        bits = x.to(tl.core.get_int_dtype(32 // PACK, True), bitcast=True)
        bits = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [bits], dtype=bits.dtype, is_pure=False, pack=PACK)
        return bits.to(x.dtype, bitcast=True)
    else:
        return x


@triton.constexpr_function
def _count_loop(ordering: str) -> str:
    return f"""{{
.reg .pred %early;
.reg .b32 %count;
LOOK${{:uid}}:
ld.{ordering}.gpu.global.s32 %count, [$1];
setp.lt.s32 %early, %count, $2;
@%early bra LOOK${{:uid}};
mov.b32 $0, %count;
}}"""


@triton.jit
def await_count(counter_ptr, target, ORDERING: tl.constexpr):
    """Returns, in each thread, once it has seen the counter at `target`; "acquire" or "relaxed"."""
    tl.inline_asm_elementwise(
        _count_loop(ORDERING), "=r,l,r", [counter_ptr.to(tl.int64), target], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.constexpr_function
def _words(bits: int, tile: Tile) -> int:
    """Registers that one piece of PTX looks at: all of a thread's part of a chunk of rows, but 16 at most."""
    return max(1, min(16, tile.BLOCK_B * tile.BLOCK_K * bits // 32 // (32 * tile.WARPS)))


@triton.constexpr_function
def _present_loop(bits: int, words: int) -> str:
    """In a register a half (or all) of ones is found by a sum: it alone has its upper bit before, and not after."""
    each = 32 // bits  # elements in a register
    address, waits = 2 * words, (2 + each) * words
    lines = ["{", ".reg .pred %again;", ".reg .b32 %sum;", ".reg .b32 %found;", ".reg .b16 %low;", ".reg .b16 %high;"]
    lines += [f"mov.b32 ${word}, ${words + word};" for word in range(words)]
    lines += ["LOOK${:uid}:", "mov.b32 %found, 0;"]
    for word in range(words):
        lines += [f"add.u32 %sum, ${word}, {0x10001 if bits == 16 else 1};", "not.b32 %sum, %sum;"]
        lines += [f"and.b32 %sum, %sum, ${word};", "or.b32 %found, %found, %sum;"]
    lines += [f"and.b32 %found, %found, ${waits};", "setp.eq.u32 %again, %found, 0;", "@%again bra DONE${:uid};"]
    for word in range(words):
        if bits == 32:
            lines += [f"setp.eq.u32 %again, ${word}, -1;"]
            lines += [f"@%again ld.volatile.global.b32 ${word}, [${address + word}];"]
            continue
        lines += [f"mov.b32 {{%low, %high}}, ${word};"]
        for k, half in enumerate(("%low", "%high")):
            lines += [f"setp.eq.s16 %again, {half}, -1;"]
            lines += [f"@%again ld.volatile.global.b16 {half}, [${address + each * word + k}];"]
        lines += [f"mov.b32 ${word}, {{%low, %high}};"]
    return "\n".join([*lines, "bra LOOK${:uid};", "DONE${:uid}:", "}"])


@triton.constexpr_function
def _present_operands(bits: int, words: int) -> str:
    elements = words * 32 // bits
    return ",".join(["=&r"] * words + ["r"] * words + ["l"] * elements + ["r"] * elements)


@triton.jit
def present(x, ptrs, there, LAYER: tl.constexpr, TILE: tl.constexpr):
    """x, loaded from `ptrs`: each thread loads again what it still finds to be the sentinel, unless all is `there`."""
    BITS: tl.constexpr = x.dtype.primitive_bitwidth
    WORDS: tl.constexpr = _words(BITS, TILE)
    tl.static_assert(LAYER.SENTINEL == -1, "the sentinel has all bits set")
    ENOUGH: tl.constexpr = TILE.BLOCK_B * TILE.BLOCK_K * BITS >= 32 * 32 * TILE.WARPS
    tl.static_assert(ENOUGH, "a thread has a register of rows")
    UPPER: tl.constexpr = -0x7FFF8000 if BITS == 16 else -0x80000000  # the upper bit of each element
    waits = tl.zeros(x.shape, tl.int32) + tl.where(there, 0, UPPER).to(tl.int32)
    bits = tl.inline_asm_elementwise(
        _present_loop(BITS, WORDS),
        _present_operands(BITS, WORDS),
        [x.to(LAYER.INT, bitcast=True), ptrs.to(tl.int64), waits],
        dtype=LAYER.INT,
        is_pure=False,
        pack=WORDS * 32 // BITS,
    )
    return bits.to(x.dtype, bitcast=True)
