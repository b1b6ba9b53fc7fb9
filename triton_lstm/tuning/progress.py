"""What a run of `tune` leaves for the process that continues it after a config kills it or the user stops it."""

from __future__ import annotations

import json
import os
from pathlib import Path


class Progress:
    """A file that lists the items that are done or failed (and why), what is running, and what killed a process.

    Deleted when the run is complete. entries: the table's entry for each item, as text. An item counts as done while
    the table still has the same entry, and as failed while any item counts as done: this file may outlive the table.
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
        except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):  # missing, or not such a file
            pass
        self._save()  # also for the watchdog, which takes an old file for a hang

    def begin(self, what: str) -> str | None:
        """Records that `what` is about to run; returns the reason if it must not."""
        if what in self._died:
            return "the process died while measuring it"
        self._running = what
        self._save()
        return None

    def done(self, item: str, entry: str) -> None:
        """Records the table's new entry for an item."""
        self._measured[item] = entry
        self.stop()

    def failed(self, item: str, why: str) -> None:
        """Records why the table has no entry for an item."""
        self._failed[item] = why
        self.stop()

    @property
    def results(self) -> dict[str, str | None]:
        """The items done in this process or an earlier one, each with None or the reason why it failed."""
        return dict.fromkeys(self._measured) | self._failed

    def stop(self) -> None:
        """Records that nothing is running, and that nothing died: the same command may continue from here."""
        self._running = None
        self._save()

    def end(self) -> None:
        """Deletes the file: the next run starts from scratch."""
        self.path.unlink(missing_ok=True)

    def _save(self) -> None:
        beside = Path(f"{self.path}.tmp")
        known = {"running": self._running, "died": self._died, "measured": self._measured, "failed": self._failed}
        beside.write_text(json.dumps(known))
        os.replace(beside, self.path)
