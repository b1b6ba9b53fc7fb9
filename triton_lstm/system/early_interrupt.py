"""Ctrl-C before a command starts. Imported first, so it uses only modules that Python has already loaded."""

import os
import signal
import sys

INTERRUPTED = 130  # the exit status


def exit_quietly_on_interrupt() -> None:
    """Makes Ctrl-C end a command without a traceback while PyTorch is being imported.

    Applies to a command's own process only; any other process that imports this package keeps its handler.
    """
    program = sys.argv[0] if getattr(sys, "argv", None) else ""  # "-m" while python locates the module to run
    ours = program == "-m" and any(word in ("triton_lstm", "-mtriton_lstm") for word in sys.orig_argv)
    ours = ours or os.path.splitext(os.path.basename(program))[0] == "triton-lstm"
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    try:  # noqa: SIM105 - contextlib would be one more import
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    except ValueError:  # not the main thread, which receives Ctrl-C
        pass
