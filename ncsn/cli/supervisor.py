"""Runs the pipeline in another process and follows it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ncsn.cli.console import ProgressView
from ncsn.cli.options import StepFailed
from ncsn.errors import Problem
from ncsn.runs.folder import RunFolder
from ncsn.runs.progress import read_progress
from ncsn.runs.records import StepError, StepRecord, read_result, read_results, read_step
from ncsn.runs.steps import STEPS

_POLL_SECONDS = 0.5
_PATIENCE = ((signal.SIGINT, 10.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
_ERROR_LINE = re.compile(
    r"^\s*(?:[a-zA-Z_]\w*\.)*(?P<kind>[A-Z]\w*(?:Error|Exception|Interrupt|NotFound)): (?P<message>.+)$"
)
_LOG_TAIL_BYTES = 65536


# KFP and Ray print much, from several processes, at the level of file descriptors. So the pipeline has a process whose
# output is a log file; progress is read from the run's folder. When this process ends, however it ends, the pipe to
# the standard input of the other closes, and the other ends itself with its children.
@dataclass
class Supervisor:
    """One execution of the pipeline."""

    folder: RunFolder
    work: Path  # local folder for KFP's files and the log
    view: ProgressView
    _before: dict[str, StepRecord] = field(default_factory=dict, init=False)

    @property
    def log(self) -> Path:
        """The output of KFP, Ray and the steps."""
        return self.work / "pipeline.log"

    def run(self, config: str) -> None:
        """Execute the pipeline, with the config as canonical JSON, to its end or a `StepFailed`."""
        self._before = read_results(self.folder)
        kfp_root = self.work / "kfp"
        earlier = set(kfp_root.glob("*"))
        request = {"config": config, "run": self.folder.run, "pipeline_root": str(kfp_root)}
        with _pipeline_process(request, self.log) as process:
            for step in STEPS:
                self.view.start(step)
                if not self._wait_for(step, process, kfp_root, earlier):
                    raise self._failure(step)
                self.view.finish(step, self._verdict(step))
            if process.wait() != 0:
                raise self._failure("finish")

    def _wait_for(self, step: str, process: subprocess.Popen[bytes], kfp_root: Path, earlier: set[Path]) -> bool:
        """Show the step's progress until KFP has its outputs; False if the pipeline ends without them."""
        while True:
            ended = process.poll() is not None
            if any((new / step / "executor_output.json").exists() for new in set(kfp_root.glob("*")) - earlier):
                return True
            if ended:
                return False
            progress = read_progress(self.folder, step)
            if progress is not None:
                self.view.update(step, progress)
            time.sleep(_POLL_SECONDS)

    def _verdict(self, step: str) -> str:
        record = read_result(self.folder, step)
        if record is None or record == self._before.get(step):
            return "already done"
        return f"done in {record.seconds:,.1f} s"

    def _failure(self, step: str) -> StepFailed:
        recorded = read_step(self.folder, step).error
        if recorded is None:
            recorded = StepError("", _last_error_line(self.log) or "ended without a result", mistake=False)
        problems = recorded.problems
        if not recorded.mistake:
            first = next(iter(recorded.message.strip().splitlines()), "no reason given")
            problems = (Problem("", ": ".join(filter(None, (recorded.kind, first)))),)
        return StepFailed(step, problems, kind=recorded.kind, mistake=recorded.mistake, log=self.log)


@contextmanager
def _pipeline_process(request: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.local"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        yield process
    finally:
        _stop(process)
        process.stdin.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and its children, SIGINT first."""
    for number, patience in _PATIENCE:
        if process.poll() is not None:
            break
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a child that outlived its parent


def _last_error_line(log: Path) -> str | None:
    """The last exception in the log, for a step that could not record its error."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
        lines = stream.read().decode(errors="replace").splitlines()
    found = [
        match for match in map(_ERROR_LINE.match, lines) if match and "finished with status" not in match["message"]
    ]
    return f"{found[-1]['kind']}: {found[-1]['message']}" if found else None
