"""Machine code as nvdisasm prints it, written by hand.

`listing("LDG.E R2, [R4] | w0 s2", "loop:", "@P0 BRA loop | ?01")`: w and r name a scoreboard, s is the stall count,
? has the scoreboards that are waited for.
"""

import re

from triton_lstm.perf.step.machine_code import Instruction, parse


def listing(*lines: str) -> str:
    printed = ["//--------------------- .text.kernel --------------------------"]
    for line in lines:
        if line.endswith(":"):
            printed.append(f".L_{line}")
            continue
        text, _, control = line.partition("|")
        text = re.sub(r"\b(BRA|CALL.REL.NOINC) (\w+)", r"\1 `(.L_\2)", text.strip())
        printed.append(f"        /*0000*/                   {text} ;   /* 0x{0:016x} */")
        printed.append(f"                                                 /* 0x{upper(control) << 40:016x} */")
    return "\n".join(printed)


def upper(control: str) -> int:
    """The bits from 40 on: one more, 4 of stall count, yield, 3 each of write and read, 6 of waits."""
    bits = {"s": "1", "w": "7", "r": "7", "?": ""} | {part[0]: part[1:] for part in control.split()}
    waits = sum(1 << int(board) for board in bits["?"])
    return int(bits["s"]) << 1 | int(bits["w"]) << 6 | int(bits["r"]) << 9 | waits << 12


def code(*lines: str) -> list[Instruction]:
    return parse(listing(*lines))
