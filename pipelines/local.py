"""Runs the train pipeline on this machine with `kfp.local`, in the current environment: `python -m pipelines.local`.

Reads one line of JSON from standard input: `{"config", "run", "pipeline_root"}`. The caller keeps that pipe open; when
it closes, the caller is gone, and this process ends with everything that it started.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from kfp import local

from pipelines.train_pipeline import train_pipeline


def run(config: str, *, run: str, pipeline_root: str) -> None:
    """Compile the pipeline from source and execute its steps one by one as subprocesses.

    `config` is canonical JSON, `pipeline_root` a local folder for KFP's artifacts.
    """
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=pipeline_root,
        workspace_root=str(Path(pipeline_root) / "workspace"),
        enable_caching=False,
        raise_on_error=True,
    )
    train_pipeline(config=config, run=run)


def _end_with_caller(pipe: int) -> None:
    os.read(pipe, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    """Read the request, then run it."""
    request = json.loads(sys.stdin.readline())
    pipe = os.dup(0)
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    threading.Thread(target=_end_with_caller, args=(pipe,), daemon=True).start()
    run(request["config"], run=request["run"], pipeline_root=request["pipeline_root"])


if __name__ == "__main__":
    main()
