"""What a run of `tune` leaves for the process that goes on in its place, if a config kills it or never ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from triton_lstm.plan import Plan
from triton_lstm.table_file import Key


class Progress:
    """A file: what is done, what is being measured, what a process died of. Gone once a run has come to its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._running: str | None = None
        self._died: list[str] = []
        self._done: list[str] = []
        try:
            before = json.loads(path.read_text())
            self._died, self._done = [str(d) for d in before["died"]], [str(d) for d in before["done"]]
            self._died += [str(before["running"])] * (before["running"] is not None)
        except FileNotFoundError:
            return
        except (ValueError, TypeError, KeyError):  # died while writing it
            pass
        self._save()

    def trial(self, key: Key) -> Callable[[Plan], str | None]:
        """What `measure` is to call before each config: the reason why one must not be run."""

        def begin(plan: Plan) -> str | None:
            self._running = f"{key} {plan}"
            if self._running in self._died:
                return "the process died while measuring it"
            self._save()
            return None

        return begin

    def is_done(self, key: Key) -> bool:
        return str(key) in self._done

    def done(self, key: Key) -> None:
        self._running = None
        self._done.append(str(key))
        self._save()

    def end(self) -> None:
        self.path.unlink(missing_ok=True)

    def _save(self) -> None:
        self.path.write_text(json.dumps({"running": self._running, "died": self._died, "done": self._done}))
