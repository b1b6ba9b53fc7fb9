"""An emulator of the PTX that Triton makes for this project's kernels: runs compiled kernels on a CPU, and checks them.

parser        the text of a kernel
decoder       instructions and operands become functions of registers
numbers       number formats: conversions and arithmetic with the rounding of the hardware
products      matrix products and their operands' layouts in registers and shared memory
arithmetic    instructions that compute
conversions   comparisons, selections, moves, conversions
warps         instructions of whole warps
accesses      loads, stores, atomics, fences
instructions  the table of all opcodes
kernel        a decoded kernel
order         what happens before what: vector clocks
tensors       tensors in global memory, and kinds of accesses
memory        global memory: bounds, unwritten elements, races, and what a thread sees of weak stores
shared        shared memory of one program: likewise, but not weak
schedule      who runs when, and which stores are seen late
groups        threads at one place, and their registers
machine       programs and their warps, and a launch
gpu           Triton's driver for it, and a process that believes it has a GPU
"""
