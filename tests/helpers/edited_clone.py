"""A clone of this project with an edit, whose commands run in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAYS = "the edited code runs"


@dataclass(frozen=True)
class Clone:
    folder: Path

    def edit(self, file: str) -> None:
        """Let each process that imports the file say so on stdout."""
        with (self.folder / file).open("a") as text:
            text.write(f"\nprint({SAYS!r}, flush=True)\n")

    def ncsn(self, *arguments: str, env: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ncsn", *arguments]
        env = {**env, "PYTHONPATH": str(self.folder)}
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, check=False)


def clone(folder: Path) -> Clone:
    """The packages, with what their links name, one commit, and nothing edited since."""
    for name in ("ncsn", "components", "pipelines", "configs", "infra"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", ".gitignore"):
        shutil.copyfile(ROOT / name, folder / name)
    who = ("-c", "user.name=Test", "-c", "user.email=test@example.com")
    for arguments in (("init", "--quiet"), ("add", "."), (*who, "commit", "--quiet", "--message", "All")):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return Clone(folder)
