"""What stands in the way of a training, in a module that the workers can import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class Obstacle:
    """A sink that makes the store refuse the second checkpoint, once."""

    target: Path

    def log(self, metrics: dict[str, float], images_seen: int, when: int) -> None:
        if images_seen == 96:
            if self.target.exists():
                self.target.unlink()
            else:
                self.target.write_text("in the way")

    def log_picture(self, png: bytes, name: str, images_seen: int, when: int) -> None:
        pass

    def close(self) -> None:
        pass
