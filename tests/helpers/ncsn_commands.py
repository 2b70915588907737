"""`ncsn` commands of this source tree in processes of their own, whose output is kept."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_cluster import PATIENCE

ROOT = Path(__file__).parents[2]


@dataclass
class Command:
    """A running command."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def wait(self, seconds: float) -> int:
        """Its exit code, within `seconds` times `PATIENCE`."""
        try:
            return self.process.wait(seconds * PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {seconds * PATIENCE:g} s; it said last: {self.said[-2000:]}"
            ) from None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    @property
    def ended(self) -> bool:
        """Whether it has."""
        return self.process.poll() is not None

    @property
    def said(self) -> str:
        """What it wrote to standard error so far."""
        return self.err.read_text(errors="replace")

    def result(self) -> Any:
        """The JSON that it printed."""
        return json.loads(self.out.read_text())


@dataclass(frozen=True)
class Commands:
    """Runs commands."""

    folder: Path
    environment: Mapping[str, str]

    @contextlib.contextmanager
    def running(self, *arguments: str) -> Iterator[Command]:
        """A running command, killed if it still runs when the block ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = f"{len(list(self.folder.glob('*.out'))):02}-{arguments[0]}"
        out, err = self.folder / f"{stem}.out", self.folder / f"{stem}.err"
        (self.folder / f"{stem}.command").write_text(shlex.join(["ncsn", *arguments]) + "\n")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "ncsn", *arguments],
                stdout=stdout,
                stderr=stderr,
                cwd=ROOT,
                env={**os.environ, **self.environment},
            )
        try:
            yield Command(process, out, err)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def run(self, *arguments: str, seconds: float, code: int = 0) -> Command:
        """A command that has ended."""
        with self.running(*arguments) as command:
            ended = command.wait(seconds)
        assert ended == code, f"ncsn {arguments[0]} exited with {ended}: {command.said[-3000:]}"
        return command

    def copy_to(self, folder: Path) -> None:
        """Keep what all commands said."""
        if self.folder.exists():
            shutil.copytree(self.folder, folder, dirs_exist_ok=True)
