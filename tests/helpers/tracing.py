"""Coverage's tracer, and what is not to be measured."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Without the tracer: it makes tests slow, and switches between greenlets would confuse it."""
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)
