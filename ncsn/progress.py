"""How much of its work a step has done, told by the code that does it."""

from __future__ import annotations


class Progress:
    """Counts the units of work that are done; this class tells nobody. A pickled copy goes on from the same count."""

    def __init__(self, done: int = 0, total: int = 0, unit: str = "", text: str = "") -> None:
        self.done, self.total, self.unit, self.text = done, total, unit, text

    def start(self, total: int, unit: str) -> None:
        """From now on `advance` counts up to `total` of `unit`, a plural such as images."""
        self.done, self.total, self.unit = 0, total, unit
        self.changed()

    def advance(self, n: int = 1) -> None:
        """`n` more units are done. May raise `LeaseExpired`, which ends the work."""
        self.done = min(self.done + n, self.total)  # the last batch may go beyond the total
        self.changed()

    def note(self, text: str) -> None:
        """Show this next to the numbers from now on."""
        self.text = text
        self.changed()

    def changed(self) -> None:
        """Tell somebody; called after each of the others."""
