"""A few lines of PTX as a kernel, for the tests of single instructions."""

from __future__ import annotations

import numpy as np

from .kernel import Kernel
from .machine import run
from .numbers import UNSIGNED
from .schedule import Schedule
from .snippets import FOOTER, HEADER

Array = np.ndarray
KIND = {0: "pred", 1: "b16", 2: "b16", 4: "b32", 8: "b64"}


def kernel_of(code: str, parameters: str = ".param .u64 snippet_param_0", threads: int = 32) -> str:
    """Of the numbered registers %p, %rs, %r and %rd."""
    return f"{HEADER.format(parameters=parameters, threads=threads)}{code}\n{FOOTER}"


def run_lines(
    code: str,
    outputs: dict[str, int],
    inputs: dict[str, Array],
    threads: int = 32,
    shared: int = 0,
    memory: Array | None = None,
) -> dict[str, Array]:
    """Runs lines and returns what each thread has in registers at the end.

    outputs: bytes of each register, 0 for a predicate, which becomes 0 or 1. inputs: the registers' values, an unsigned
    integer for each thread, or one for all, which comes in a parameter of the kernel. memory: a tensor, whose address
    is in %memory; it is changed in place. %r98 is the thread's number.
    """
    head, tail, parameters, arguments, kept = ["mov.u32 %r98, %tid.x;", "cvt.u64.u32 %rd98, %r98;"], [], [], [], {}

    def tensor(name: str, values: Array, written: bool) -> str:
        """The address of each thread's element, in %rd97."""
        parameters.append(f".param .u64 snippet_param_{len(parameters)}")
        arguments.append((name, values, np.full(values.shape, written), 0, False))
        address = f"ld.param.b64 %rd97, [snippet_param_{len(parameters) - 1}];"
        return f"{address} mad.lo.s64 %rd97, %rd98, {values.itemsize}, %rd97;"

    if memory is not None:
        head.append(f".reg .b64 %memory; {tensor('memory', memory, True).split(';')[0]}; mov.b64 %memory, %rd97;")
    for name, value in inputs.items():
        size = value.itemsize
        head.append(f".reg .{KIND[size]} {name};")
        if value.size == threads:
            head += [tensor(name, value.copy(), True), f"ld.global.b{8 * size} {name}, [%rd97];"]
        else:
            head.append(f"ld.param.b{8 * size} {name}, [snippet_param_{len(parameters)}];")
            parameters.append(f".param .u{8 * size} snippet_param_{len(parameters)}")
            arguments.append(int(value.ravel()[0]))
    for name, size in outputs.items():
        if name not in inputs:
            head.append(f".reg .{KIND[size]} {name};")
        kept[name] = np.zeros(threads, UNSIGNED[size or 4])
        tail.append(tensor(name, kept[name], False))
        tail.append(f"selp.b32 %r97, 1, 0, {name};" if size == 0 else "")
        tail.append(f"st.global.b{8 * (size or 4)} [%rd97], {name if size else '%r97'};")
    ptx = kernel_of("\n".join([*head, code, *filter(None, tail)]), ",\n".join(parameters), threads)
    run(Kernel(ptx), arguments, (1, 1, 1), shared, cooperative=False, schedule=Schedule())
    return kept


def evaluate(opcode: str, operands: str, result_digits: int) -> list[str]:
    """The result of an instruction, in hexadecimal digits, for operands in memory, in parameters, and mixed.

    A register is as wide as its operand has digits; one digit is a predicate. The result is the first of the digits.
    """
    names, values = ["%a", "%b", "%c"], operands.split()
    size = result_digits // 2
    found = []
    for in_memory in (["%a", "%b", "%c"], [], ["%a"], ["%b", "%c"]):
        inputs, code, used = {}, [], []
        for name, value in zip(names, values, strict=False):
            if len(value) == 1:
                code.append(f"setp.ne.b32 %p{len(used)}, {value}, 0;")
                used.append(f"%p{len(used)}")
            else:
                number = np.array([int(value, 16)], UNSIGNED[len(value) // 2])
                inputs[name] = np.repeat(number, 32) if name in in_memory else number
                used.append(name)
        code.append(f"{opcode} {', '.join(['%d', *used])};")
        found += {f"{x:0{result_digits}x}" for x in run_lines("\n".join(code), {"%d": size}, inputs)["%d"].tolist()}
    return sorted(set(found))
