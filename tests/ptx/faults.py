"""What the emulator reports."""

from __future__ import annotations


class Fault(AssertionError):  # noqa: N818 - the kernel's, not the emulator's
    """A kernel did what its hardware does not promise to work, or would not have told."""


class UnknownInstructionError(NotImplementedError):
    """The emulator does not know an instruction, or a form of it."""
