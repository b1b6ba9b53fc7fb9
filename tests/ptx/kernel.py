"""A kernel whose instructions are decoded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from .decoder import Decoder
from .instructions import FAMILIES
from .parser import parse


class Kernel:
    """A decoded kernel; `accesses` of its instructions that have one."""

    def __init__(self, ptx: str) -> None:
        self.text = parse(ptx)
        decoder = Decoder(self.text, FAMILIES)
        self.operations = [decoder.decode(instruction, k) for k, instruction in enumerate(self.text.code)]
        self.initial, self.slots = decoder.initial, decoder.slots
        self.accesses = decoder.accesses
        self.threads, self.parameters = self.text.threads, list(self.text.parameters.values())
        self.has_products = any(i.parts[0] == "wgmma" for i in self.text.code)
        self.cell = _smallest_shared_access(self.text.code)
        self.straight = functools.cache(self._straight)

    def _straight(self, pc: int) -> tuple[tuple[Callable[[Any], Any], ...], int]:
        """The operations from `pc` on that only change registers and shared memory, and where they end."""
        end = pc
        while self.operations[end].kind == "plain":
            end += 1
        return tuple(operation.run for operation in self.operations[pc:end]), end


def _smallest_shared_access(code: Sequence[Any]) -> int:
    sizes = [int(i.parts[-1][1:]) // 8 for i in code if i.parts[0] in ("ld", "st") and "shared" in i.opcode]
    sizes += [2 for i in code if i.parts[0] in ("ldmatrix", "stmatrix", "wgmma")]
    return min([4, *sizes])
