"""How much of its work a step has done, told by the code that does it."""

from __future__ import annotations


class Progress:
    """Counts the units of work that are done; this class tells nobody. A pickled copy goes on from the same count."""

    def __init__(self) -> None:
        self.done, self.total, self.unit, self.text = 0, 0, "", ""

    def start(self, total: int, unit: str) -> None:
        """From now on `advance` counts up to `total` of `unit`, a plural such as images."""
        self.done, self.total, self.unit = 0, total, unit
        self._changed()

    def advance(self, n: int = 1) -> None:
        """`n` more units are done. May raise `LeaseExpired`, which ends the work."""
        self.done += n
        self._changed()

    def note(self, text: str) -> None:
        """Show this next to the numbers from now on."""
        self.text = text
        self._changed()

    def _changed(self) -> None:
        pass

    def __call__(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        self._changed()
