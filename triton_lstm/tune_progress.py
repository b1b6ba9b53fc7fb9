"""What a run of `tune` leaves for the process that goes on in its place: if a config kills it, if it is stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path


class Progress:
    """A file with what is done (and why it failed), what is running, and what processes died of. Gone after the end.

    entries: what the table has of each item, in words. What is done counts while the table still has what it had then,
    and what failed while any of it counts: this file may outlive the table.
    """

    def __init__(self, path: Path, entries: dict[str, str]) -> None:
        self.path = path
        self._running: str | None = None
        self._died: list[str] = []
        self._measured: dict[str, str] = {}
        self._failed: dict[str, str] = {}
        try:
            before = json.loads(path.read_text())
            measured, failed = dict(before["measured"]), dict(before["failed"])
            died, running = list(before["died"]), before["running"]
            texts = [*measured.values(), *failed.values(), *died, *[running] * (running is not None)]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError
            self._measured = {item: entry for item, entry in measured.items() if entries.get(item) == entry}
            self._failed = failed if self._measured else {}
            self._died = [*died, *[running] * (running is not None)]
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

    def done(self, item: str, entry: str) -> None:
        """Notes what the table has of an item now."""
        self._measured[item] = entry
        self.stop()

    def failed(self, item: str, why: str) -> None:
        """Notes why the table has nothing of an item."""
        self._failed[item] = why
        self.stop()

    @property
    def results(self) -> dict[str, str | None]:
        """The items that are done, in this process or one before it, and why they failed."""
        return dict.fromkeys(self._measured) | self._failed

    def stop(self) -> None:
        """Nothing runs any more, and nothing has died: the same command may go on from here."""
        self._running = None
        self._save()

    def end(self) -> None:
        """All is done: the next run begins anew."""
        self.path.unlink(missing_ok=True)

    def _save(self) -> None:
        beside = Path(f"{self.path}.tmp")
        known = {"running": self._running, "died": self._died, "measured": self._measured, "failed": self._failed}
        beside.write_text(json.dumps(known))
        os.replace(beside, self.path)
