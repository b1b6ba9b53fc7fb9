"""What a run of `tune` leaves for the process that goes on in its place: if a config kills it, if it is stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path


class Progress:
    """A file with what is done (and why it failed), what is running, and what processes died of. Gone after the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._running: str | None = None
        self._died: list[str] = []
        self._done: dict[str, str | None] = {}
        try:
            before = json.loads(path.read_text())
            done, died, running = dict(before["done"]), list(before["died"]), before["running"]
            self._done, self._died = done, [*died, *[running] * (running is not None)]
        except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):  # none, or no file of this kind
            pass
        self._save()  # also for the watchdog, to whom an old file is a hang

    def begin(self, what: str) -> str | None:
        """Notes that `what` is about to run; returns the reason why it must not."""
        if what in self._died:
            return "the process died while measuring it"
        self._running = what
        self._save()
        return None

    def done(self, item: str, why_not: str | None) -> None:
        """Notes that an item has a result, or the reason why it has none."""
        self._running = None
        self._done[item] = why_not
        self._save()

    @property
    def results(self) -> dict[str, str | None]:
        """The items that are done, in this process or one before it, and why they failed."""
        return dict(self._done)

    def stop(self) -> None:
        """Nothing runs any more, and nothing has died: the same command may go on from here."""
        self._running = None
        self._save()

    def end(self) -> None:
        """All is done: the next run begins anew."""
        self.path.unlink(missing_ok=True)

    def _save(self) -> None:
        beside = Path(f"{self.path}.tmp")
        beside.write_text(json.dumps({"running": self._running, "died": self._died, "done": self._done}))
        os.replace(beside, self.path)
