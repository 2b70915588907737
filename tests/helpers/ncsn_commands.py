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
    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds * PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {seconds * PATIENCE:g} s; it said last: {self.said[-2000:]}"
            ) from None

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def said(self) -> str:
        return self.err.read_text(errors="replace")

    def result(self) -> Any:
        return json.loads(self.out.read_text())


@dataclass(frozen=True)
class Commands:
    folder: Path
    environment: Mapping[str, str]

    @contextlib.contextmanager
    def running(self, *arguments: str) -> Iterator[Command]:
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
        with self.running(*arguments) as command:
            ended = command.wait(seconds)
        assert ended == code, f"ncsn {arguments[0]} exited with {ended}: {command.said[-3000:]}"
        return command

    def copy_to(self, folder: Path) -> None:
        if self.folder.exists():
            shutil.copytree(self.folder, folder, dirs_exist_ok=True)
