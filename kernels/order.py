"""What the compiler must not move."""

import triton
import triton.language as tl
from triton.runtime import JITFunction

COMPILED = tl.constexpr(isinstance(tl.cdiv, JITFunction))  # or interpreted, where every load is there at once


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
