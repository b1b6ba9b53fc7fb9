"""All opcodes that the emulator knows. Any other, and any modifier that its family does not name, is an error.

A new one is a row of FAMILIES, a function that makes it of its modifiers and operands, and rows of a test whose results
come from the PTX manual. What the function does not accept must raise: by `only` and `require`, or by unpacking parts
and operands, whose IndexError, KeyError or ValueError counts as not known; a guard that it does not ask for is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import accesses, arithmetic, conversions, numbers, warps
from .decoder import Decoder, Family, Operands, Operation, Run
from .faults import UnknownInstructionError


def branch(d: Decoder, o: Operands) -> Operation:
    d.only("uni")
    (label,) = o
    guard = d.guard
    run = (lambda group: None) if guard is None else (lambda group: guard(group.registers))
    return Operation(run, d.at, kind="branch", target=d.text.labels[label])


def finish(d: Decoder, o: Operands) -> Operation:
    d.require(d.at.opcode == "ret" and not o)
    return Operation(lambda group: None, d.at, kind="return")


def refuse_tensor_memory(d: Decoder, o: Operands) -> Run:
    raise UnknownInstructionError(f"the emulator has no tensor memory (tcgen05, mbarrier): {d.at.place}")


def _float64(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Of float32, in float64."""
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


SIGNED = ("f32", "f64", "f16", "bf16", "s16", "s32", "s64")
FAMILIES: dict[str, Family] = {
    "add": arithmetic.arithmetic(np.add),
    "sub": arithmetic.arithmetic(np.subtract),
    "mul": arithmetic.multiply,
    "mad": arithmetic.multiply_add,
    "fma": arithmetic.fused,
    "div": arithmetic.division,
    "rem": arithmetic.remainder,
    "neg": arithmetic.unary(np.negative, *SIGNED),
    "abs": arithmetic.unary(np.abs, *SIGNED),
    "ex2": arithmetic.unary(_float64(np.exp2), "approx.f32", "approx.ftz.f32"),
    "rsqrt": arithmetic.unary(_float64(lambda x: 1 / np.sqrt(x)), "approx.f32", "approx.ftz.f32"),
    "sqrt": arithmetic.unary(np.sqrt, "rn.f32", "approx.f32", "rn.f64"),
    "rcp": arithmetic.unary(lambda x: 1 / x, "rn.f32", "approx.f32", "rn.f64"),
    "min": arithmetic.extreme(numbers.minimum, numbers.nan_minimum, np.minimum),
    "max": arithmetic.extreme(numbers.maximum, numbers.nan_maximum, np.maximum),
    "and": arithmetic.bitwise(np.bitwise_and),
    "or": arithmetic.bitwise(np.bitwise_or),
    "xor": arithmetic.bitwise(np.bitwise_xor),
    "not": arithmetic.bitwise(np.bitwise_not, 1),
    "shl": arithmetic.shift(numbers.shift_left, np.left_shift, *arithmetic.BITS),
    "shr": arithmetic.shift(numbers.shift_right, np.right_shift, *arithmetic.BITS, *arithmetic.INTEGERS),
    "bfe": arithmetic.bit_field,
    "prmt": arithmetic.permute,
    "setp": conversions.set_predicate,
    "selp": conversions.select,
    "mov": conversions.move,
    "cvt": conversions.convert,
    "ld": accesses.load,
    "st": accesses.store,
    "atom": accesses.atomic,
    "red": accesses.atomic,
    "ldmatrix": accesses.load_matrix,
    "stmatrix": accesses.store_matrix,
    "mma": warps.matrix_product,
    "wgmma": warps.warp_group,
    "shfl": warps.shuffle,
    "redux": warps.reduce_warp,
    "vote": warps.vote,
    "bra": branch,
    "ret": finish,
    "bar": warps.barrier,
    "barrier": warps.barrier,
    "membar": accesses.fence,
    "fence": accesses.fence,
    "tcgen05": refuse_tensor_memory,
    "mbarrier": refuse_tensor_memory,
    "elect": refuse_tensor_memory,
}
