"""What every step shares: the run's folder, the claim on a run name, and doing the work once.

A step is idempotent: asked again with the same inputs it returns the stored result. Its result is JSON in the store,
so that a launcher on another machine needs no back-channel.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from ncsn import storage
from ncsn.errors import Problem, UserError
from ncsn.runs.folder import RunFolder
from ncsn.runs.records import ProgressFile, add_seconds, stored_error, stored_record

R = TypeVar("R")


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
        add_seconds(folder, step, time.time() - started)
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


def stored_mistake(folder: RunFolder, step: str) -> UserError | None:
    """The user's mistake that ended the step's last attempt, or None."""
    record = stored_error(folder, step)
    return UserError.of(map(Problem.from_json, record["problems"])) if record is not None and record["user"] else None
