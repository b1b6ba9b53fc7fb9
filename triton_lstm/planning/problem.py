"""What a plan is made for: one time loop of a layer, on a device."""

from __future__ import annotations

from typing import NamedTuple

from triton_lstm.planning.devices import Device


class Problem(NamedTuple):
    """The time loop of a layer; every question about plans is asked of one.

    A named tuple: plans are looked up by it on every call, and a tuple is hashed and compared without running Python.

    precision: "bf16", "fp16", "tf32", "fp32" or "fp64", as in tables and benchmarks. B: rows of a step.
    H: hidden units. backward: back-propagation through time. directions: 2 if the layer is bidirectional.
    """

    device: Device
    precision: str
    B: int
    H: int
    backward: bool
    directions: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes per element on chip. Raises ValueError where the device does not support the precision."""
        return self.device.itemsize(self.precision)

    @property
    def stored_itemsize(self) -> int:
        """Bytes per element in memory; on chip, "fp32" takes twice as many."""
        return min(self.itemsize, 4)

    @property
    def row_length(self) -> int:
        """Elements of a row that a step reads, and terms of the recurrent product's sum: H, backward all gates' 4H."""
        return 4 * self.H if self.backward else self.H

    @property
    def columns_per_unit(self) -> int:
        """Columns of the recurrent product per hidden unit: its four gates, backward its dh."""
        return 1 if self.backward else 4

    @property
    def load_bytes(self) -> int:
        """Bytes of rows that a thread loads at a time: 16, or fewer where rows are not aligned to 16 bytes."""
        row = self.stored_itemsize * self.row_length
        return min(16, row & -row)
