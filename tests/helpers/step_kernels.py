"""Compiles time loops for GPUs that are not here, and says what the model of a step makes of them, one JSON a line.

With TRITON_INTERPRET set there would be nothing to compile.
"""

import json
import sys

import triton
import triton.language as tl
from triton.compiler import ASTSource

from triton_lstm.perf.exchange_loop import WARPS
from triton_lstm.perf.step.compiled import compile_exchange, compile_kernel, target
from triton_lstm.perf.step.machine_code import disassemble, parse
from triton_lstm.perf.step.model import model_step
from triton_lstm.perf.step.path import find_path, polled, product, store
from triton_lstm.perf.step.timeline import Loop
from triton_lstm.planning.devices import GPUS
from triton_lstm.planning.plan import EXCHANGES, Plan
from triton_lstm.planning.problem import Problem
from triton_lstm.planning.space import candidates

T, B = 1024, 16


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def heads_kernel(xg_ptr, r_ptr, b_ptr, h0_ptr, c0_ptr, states_ptr, gates_ptr, HEAD: tl.constexpr):
    """An LSTM whose units are in heads that do not see each other, a program each, as in FlashRNN's Triton kernel: four
    weights stay on chip; h, c and the gates of every step are stored."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    unit = tl.arange(0, HEAD)
    offs = head * (16 * HEAD) + tl.arange(0, 16)[:, None] * HEAD + unit[None, :]
    r_ptr += head * (4 * HEAD * HEAD) + unit[:, None] * HEAD + unit[None, :]
    b_ptr += head * (4 * HEAD) + unit[None, :]
    weights = ()
    biases = ()
    for gate in tl.static_range(4):
        weights = weights + (tl.load(r_ptr + gate * HEAD * HEAD),)
        biases = biases + (tl.load(b_ptr + gate * HEAD),)
    h = tl.load(h0_ptr + offs).to(tl.float32)
    c = tl.load(c0_ptr + offs).to(tl.float32)
    size = heads * 16 * HEAD
    dtype = states_ptr.dtype.element_ty
    for t in range(1024):
        xg = xg_ptr + t * 4 * size + offs
        x = ()
        for gate in tl.static_range(4):
            x = x + (tl.load(xg + gate * size),)
        a = ()
        for gate in tl.static_range(4):
            a = a + (tl.dot(h.to(dtype), weights[gate]) + x[gate] + biases[gate],)
        i, f, g, o = tl.sigmoid(a[0]), tl.sigmoid(a[1]), tanh(a[2]), tl.sigmoid(a[3])
        c = f * c + i * g
        h = o * tanh(c)
        states = states_ptr + t * 2 * size + offs
        tl.store(states, h.to(dtype))
        tl.store(states + size, c.to(dtype))
        gates = gates_ptr + t * 4 * size + offs
        tl.store(gates, i.to(dtype))
        tl.store(gates + size, f.to(dtype))
        tl.store(gates + 2 * size, g.to(dtype))
        tl.store(gates + 3 * size, o.to(dtype))


def compiled(function, gpu, warps, **constants):
    signature = {n: "constexpr" if n in constants else "*bf16" for n in function.arg_names}
    attributes = {(k,): [["tt.divisibility", 16]] for k, n in enumerate(function.arg_names) if n.endswith("_ptr")}
    indices = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, indices, attributes)
    return triton.compile(source, target=target(GPUS[gpu]), options=dict(num_warps=warps))


def report(name, made, loop):
    code = parse(disassemble(made.asm["cubin"])[2])
    path, step = find_path(code, loop.chunks), model_step(code, loop)

    def counts(piece):
        kinds = [code[k] for k in piece.instructions]
        return {test.__name__: sum(map(test, kinds)) for test in (product, polled, store)}

    pieces = [dict(kind=piece.kind, **counts(piece)) for piece in path.pieces]
    products = sum(map(product, code))
    us = {"us": step.us(step.cycles), "us_waiting": step.us(step.waiting), "looks": step.looks}
    phases = sum(sum(reasons.values()) for reasons in step.phases.values())
    row = dict(name=name, pieces=pieces, products=products)
    print(json.dumps(row | us | dict(cycles=step.cycles, phases=phases)), flush=True)


def main():
    for head in (16, 32, 64, 128):
        report(f"heads-{head}", compiled(heads_kernel, "H100", 4, HEAD=head), Loop(warps=4))
    for backward in (False, True):
        direction = "backward" if backward else "forward"
        problem = Problem(GPUS["H100"], "bf16", 16, 256, backward)
        plans = {
            "flag": next(plan for plan in candidates(problem) if plan.exchange == "flag"),
            "barrier": next(plan for plan in candidates(problem) if plan.exchange == "barrier"),
            "streamed": next(plan for plan in candidates(problem) if plan.exchange == "flag" and not plan.resident),
        }
        alone = Problem(GPUS["H100"], "bf16", 16, 32, backward)
        plan = Plan("none", True, True, 16, 32, 32, 1, groups=1, warps=4)
        report(f"none-{direction}", compile_kernel(alone, plan), Loop.of(alone, plan))
        for name, plan in plans.items():
            report(f"{name}-{direction}", compile_kernel(problem, plan), Loop.of(problem, plan))
    for exchange in EXCHANGES:
        report(f"bare-{exchange}", compile_exchange(GPUS["H100"], 32, exchange), Loop(warps=WARPS, programs=32))
        plan = Plan(exchange, True, True, 16, 32, 256, 1, groups=1, warps=4, splits=4)
        report(f"split-{exchange}", compile_kernel(problem, plan), Loop.of(problem, plan))


if __name__ == "__main__":
    sys.exit(main())
