"""What every step shares: the run's folder, the claim on a run name, and doing the work once.

A step is idempotent: asked again with the same inputs it returns the stored result. Its result is JSON in the store,
so that a launcher on another machine needs no back-channel.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from ncsn import storage
from ncsn.config import Config, changed_settings, from_yaml, to_yaml
from ncsn.errors import Problem, UserError, problems_of
from ncsn.process import KFP_RUN_ID
from ncsn.steps.progress import ProgressFile

STEPS = ("ingest", "train", "sample", "evaluate", "register", "report")
RUN_PATTERN = re.compile(r"[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?")

R = TypeVar("R")


class ForeignRun(UserError):
    """The name of a run belongs to another config."""


@dataclass(frozen=True)
class RunFolder:
    """URIs of everything that one run keeps."""

    root: str
    run: str

    @property
    def uri(self) -> str:
        """`<root>/runs/<run>`."""
        return storage.join(self.root, "runs", self.run)

    @property
    def config(self) -> str:
        """The experiment that owns this run name."""
        return storage.join(self.uri, "config.yaml")

    @property
    def checkpoints(self) -> str:
        """Folder of the checkpoints, managed by Ray Train."""
        return storage.join(self.uri, "checkpoints")

    @property
    def history(self) -> str:
        """The curves of training."""
        return storage.join(self.uri, "history.json")

    @property
    def report(self) -> str:
        """Folder of the figures for people."""
        return storage.join(self.uri, "report")

    @property
    def evaluation(self) -> str:
        """Folder of the evaluation figures."""
        return storage.join(self.uri, "evaluation")

    @property
    def search(self) -> str:
        """Folder of a search and of what it found."""
        return storage.join(self.uri, "search")

    def samples(self, checkpoint_digest: str, sampler_digest: str) -> str:
        """Folder of the images that one sampler made from one checkpoint."""
        return storage.join(self.uri, "samples", checkpoint_digest, sampler_digest)

    def step(self, step: str, file: str) -> str:
        """A file that one step keeps: `result.json`, `progress.json` or `error.json`."""
        return storage.join(self.uri, "steps", step, file)


def run_folder(config: Config, run: str) -> RunFolder:
    """The folder of `run` below `config.storage.root`.

    Raises:
        UserError: for a name that cannot be a folder, a Ray job and an MLflow run at once.
    """
    if not RUN_PATTERN.fullmatch(run):
        raise UserError(
            "--run",
            "is not a valid name",
            hint="use 1 to 63 lower-case letters, digits, '-', '_' and '.', starting and ending with a letter or digit",
            value=run,
        )
    return RunFolder(root=storage.absolute(config.storage.root), run=run)


def claim_run(config: Config, run: str) -> RunFolder:
    """Take the run name for this experiment, or find that it is this experiment's already.

    Raises:
        ForeignRun: if another config (in what decides the weights) uses the name; the message says what differs.
        UserError: for a name that no run can have.
    """
    folder = run_folder(config, run)
    if storage.publish_once(folder.config, to_yaml(config).encode()):
        return folder
    owner = from_yaml(storage.read_text(folder.config), origin=folder.config)
    require_owner(owner, config, run)
    return folder


def require_owner(owner: Config, config: Config, run: str) -> None:
    """Refuse a config that would decide the weights of another's run otherwise.

    Raises:
        ForeignRun: naming the first settings that differ.
    """
    changed = changed_settings(owner, config)
    if changed:
        shown = "; ".join(f"{path} is {old!r} there and {new!r} here" for path, (old, new) in list(changed.items())[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ForeignRun(
            "--run", f"belongs to another config: {shown}{more}", hint="choose another --run NAME", value=run
        )


def load_result(folder: RunFolder, step: str, result_type: type[R]) -> R:
    """The stored result of an earlier step.

    Raises:
        UserError: if that step has not finished in this run.
    """
    stored = stored_record(folder, step)
    if stored is None:
        raise UserError(
            "--run",
            f"has no result of step {step}",
            hint=f"run `ncsn {step} --run {folder.run}` first",
            value=folder.run,
        )
    return result_type(**stored["result"])


def once(
    folder: RunFolder,
    step: str,
    *,
    inputs: Mapping[str, Any],
    result_type: type[R],
    outputs: Callable[[R], Sequence[str]],
    unit: str,
    work: Callable[[ProgressFile], R],
    elsewhere: Callable[[], None] | None = None,
) -> R:
    """Do the step's work unless its result for the same inputs is there.

    Args:
        folder: The run.
        step: Name of the step, one of `STEPS`.
        inputs: Plain values that decide the result; equal inputs mean equal work.
        result_type: Frozen dataclass of plain values.
        outputs: URIs that a stored result needs to be of use; if one is gone the work is done again.
        unit: What the progress counts.
        work: Does the work; gets the callable that publishes progress.
        elsewhere: Has it done on another machine instead, which leaves the result in the store.

    Returns:
        The stored or the new result.
    """
    inputs = json.loads(json.dumps(inputs))
    stored = stored_record(folder, step)
    # A result that an older version stored may lack a field; then the work is done again.
    fields = {field.name for field in dataclasses.fields(result_type)}  # type: ignore[arg-type]
    if stored is not None and stored["inputs"] == inputs and stored["result"].keys() == fields:
        result = result_type(**stored["result"])
        if all(storage.exists(uri) for uri in outputs(result)):
            return result
    if elsewhere is not None:
        return _result_from_elsewhere(folder, step, elsewhere, inputs=inputs, result_type=result_type)
    progress = ProgressFile(folder.step(step, "progress.json"), unit)
    started = time.time()
    try:
        result = work(progress)
    finally:
        _spend(folder, step, time.time() - started)
    record = {
        "step": step,
        "run": folder.run,
        "inputs": inputs,
        "result": dataclasses.asdict(result),  # type: ignore[call-overload]
        "seconds": round(time.time() - started, 3),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    storage.write_text(folder.step(step, "result.json"), json.dumps(record, indent=1))
    return result


def spent_seconds(folder: RunFolder, step: str) -> float | None:
    """What all calls of the step took together, but for those that were killed; None if it was never at work."""
    try:
        return float(storage.read_json(folder.step(step, "spent.json"))["seconds"])
    except FileNotFoundError:
        return None


def _spend(folder: RunFolder, step: str, seconds: float) -> None:
    """Add to the account of the step; a full disk must not hide the first error."""
    with suppress(OSError):
        whole = (spent_seconds(folder, step) or 0.0) + seconds
        storage.write_text(folder.step(step, "spent.json"), json.dumps({"seconds": round(whole, 3)}))


def _result_from_elsewhere(
    folder: RunFolder,
    step: str,
    elsewhere: Callable[[], None],
    *,
    inputs: Mapping[str, Any],
    result_type: type[R],
) -> R:
    """Have the step done; the other side keeps its own records."""
    elsewhere()
    stored = stored_record(folder, step)
    if stored is None or stored["inputs"] != inputs:
        raise RuntimeError(
            f"step {step} ended on the cluster without a result for these inputs in {folder.uri}/steps/{step}; "
            "does the cluster (compute.kuberay.image) hold this version of ncsn, and does it reach this store?"
        )
    return result_type(**stored["result"])


def stored_record(folder: RunFolder, step: str) -> dict[str, Any] | None:
    """The record of an earlier call of the step: its inputs, its result and when it was made; None if there is none."""
    try:
        record: dict[str, Any] = storage.read_json(folder.step(step, "result.json"))
    except FileNotFoundError:
        return None
    return record


@contextmanager
def recorded(config: Config, run: str, step: str) -> Iterator[RunFolder]:
    """Leave whatever ends the block early as the step's `error.json`, for those who wait elsewhere.

    Commands and pipeline tasks put all of a step into one such block, so that a failure before its work is told too.
    What an earlier attempt left is removed first.

    Args:
        config: The experiment.
        run: Name of the run.
        step: Name of the step.

    Raises:
        ForeignRun: if the run belongs to another config, whose records stay as they are.
    """
    folder = claim_run(config, run)
    storage.delete_file(folder.step(step, "error.json"))
    try:
        yield folder
    except BaseException as error:
        _record_error(folder, step, error)
        raise


def stored_error(folder: RunFolder, step: str) -> dict[str, Any] | None:
    """What ended the step's last attempt, or None: `type`, `user` (a mistake?), `message`, `problems` and `kfp_run`."""
    try:
        record: dict[str, Any] = storage.read_json(folder.step(step, "error.json"))
    except FileNotFoundError:
        return None
    return record


def stored_mistake(folder: RunFolder, step: str) -> UserError | None:
    """The user's mistake that ended the step's last attempt, or None."""
    record = stored_error(folder, step)
    return UserError.of(map(Problem.from_json, record["problems"])) if record is not None and record["user"] else None


def _record_error(folder: RunFolder, step: str, error: BaseException) -> None:
    """A full disk must not hide the first error."""
    problems = problems_of(error)
    record = {
        "type": type(error).__name__,
        "user": bool(problems),
        "message": str(error),
        "problems": [problem.to_json() for problem in problems],
        "kfp_run": os.environ.get(KFP_RUN_ID, ""),
    }
    try:
        storage.write_text(folder.step(step, "error.json"), json.dumps(record))
    except OSError as failure:
        error.add_note(f"(the error could not be recorded in the store: {failure})")
