"""Ctrl-C before a command begins. The first import there is; what it imports itself, Python has imported already."""

import os
import signal
import sys

INTERRUPTED = 130  # the exit status


def leave_quietly() -> None:
    """Ends a command that is interrupted before it begins, while PyTorch is being imported, without a traceback.

    For the process of a command only; in any other that imports this package, Ctrl-C stays what it is.
    """
    started = sys.argv[0] if getattr(sys, "argv", None) else ""  # "-m" while python looks for the module to run
    ours = started == "-m" and any(word in ("triton_lstm", "-mtriton_lstm") for word in sys.orig_argv)
    ours = ours or os.path.splitext(os.path.basename(started))[0] == "triton-lstm"
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    try:  # noqa: SIM105 - contextlib would be one more import
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    except ValueError:  # not the main thread, which Ctrl-C goes to
        pass
