"""How far a step is, as a small file in the run's folder.

The step may run in another process or on another machine than the person who waits for it, so progress travels
through the store: whoever shows a bar polls the file.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field

from ncsn import storage
from ncsn.patience import limited


@dataclass
class ProgressFile:
    """Publishes `{"done", "total", "unit"}` and perhaps a `note` at `uri`, at most once per `interval` seconds.

    Picklable, so that a Ray worker can carry it. A store that cannot be written neither stops nor delays the work.
    """

    uri: str
    unit: str
    interval: float = 1.0
    _note: str = field(default="", repr=False)
    _next: float = field(default=0.0, repr=False)

    def say(self, note: str) -> None:
        """Show this beside the numbers from now on."""
        self._note = note

    def __call__(self, done: int, total: int) -> None:
        """Say that `done` of `total` units are done."""
        now = time.monotonic()
        if now < self._next and done < total:
            return
        self._next = now + self.interval
        record = {"done": done, "total": total, "unit": self.unit} | ({"note": self._note} if self._note else {})
        try:
            with limited(0):
                storage.write_text(self.uri, json.dumps(record))
        except OSError:
            self._next = now + 30 * self.interval
