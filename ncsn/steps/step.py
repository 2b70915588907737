"""What every step shares: the run's folder, the claim on a run name, and doing the work once.

A step is idempotent: asked again with the same inputs it returns the stored result. Its result is JSON in the store,
so that a launcher on another machine needs no back-channel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from ncsn import storage
from ncsn.config import Config, to_yaml
from ncsn.config.compute import ComputeConfig
from ncsn.data.format import load_manifest
from ncsn.errors import Problem, UserError
from ncsn.remote.backend import Backend, RemoteFailure, RemoteLost, RemoteStep
from ncsn.runs.folder import RunFolder
from ncsn.runs.records import ProgressFile, add_seconds, clear_outcome, stored_error, stored_record

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


def open_backend(compute: ComputeConfig) -> Backend | None:
    """The backend that `compute.backend` names; None for the local one, which is this process."""
    if compute.backend == "local":
        return None
    if compute.backend == "ray-jobs":
        from ncsn.remote.ray_jobs import RayJobs

        return RayJobs(compute)
    from ncsn.remote.kuberay import KubeRay

    return KubeRay(compute)


STEPS_ELSEWHERE = ("tune", "train", "sample", "evaluate")
"""Those that run where `compute.backend` says; the others run where they are started."""

_DIGEST_CHARACTERS = 12


def elsewhere(
    config: Config, folder: RunFolder, step: str, *, inputs: Mapping[str, str], inject: Sequence[str] = ()
) -> Callable[[], None] | None:
    """What does the step's work where `compute.backend` says; None if that is here.

    Args:
        config: The experiment.
        folder: The run.
        step: Name of the step, a command of `ncsn`.
        inputs: URIs for the step's options of the same names.
        inject: Faults to rehearse there.

    Returns:
        A function that returns when the step's result is in the store. It raises UserError for a mistake that the
        step found there, and `RemoteFailure` for any other end.
    """
    assert step in STEPS_ELSEWHERE
    if config.compute.backend == "local":
        return None
    options = [part for name, value in inputs.items() for part in (f"--{name}", value)]
    options += [part for text in inject for part in ("--inject", text)]
    return lambda: _run_elsewhere(config, folder, step, options, inputs=inputs)


def _run_elsewhere(
    config: Config, folder: RunFolder, step: str, options: list[str], *, inputs: Mapping[str, str]
) -> None:
    if config.compute.backend == "kuberay" and storage.is_local(folder.uri):
        raise UserError(
            "storage.root",
            f"is a folder of this machine, which the pods of compute.backend {config.compute.backend} cannot reach",
            hint="use s3://BUCKET/PREFIX",
            value=config.storage.root,
        )
    backend = open_backend(_sized(config, step, inputs).compute)
    assert backend is not None
    uri, digest = _publish_config(config, folder, step)
    storage.delete_file(folder.step(step, "error.json"))
    clear_outcome(folder)
    remote = RemoteStep(
        run=folder.run,
        step=step,
        uri=storage.join(folder.uri, "steps", step),
        command=("ncsn", step, "--config", uri, "--run", folder.run, *options, "--json"),
        facts={
            "ncsn.config": digest,
            "mlflow.experiment": config.tracking.experiment,
            "mlflow.run_name": f"{folder.run}/{step}",
        },
        mistaken=lambda: stored_mistake(folder, step) is not None,
    )
    try:
        backend.execute(remote)
    except RemoteLost:
        if not storage.exists(folder.step(step, "result.json")):
            raise
    except RemoteFailure as failure:
        mistake = stored_mistake(folder, step)
        if mistake is None:
            raise
        raise mistake from failure


def _sized(config: Config, step: str, inputs: Mapping[str, str]) -> Config:
    """The config with memory for its workers."""
    compute = config.compute
    if compute.backend != "kuberay" or compute.kuberay.memory_per_worker is not None:
        return config
    from ncsn.model.memory import worker_memory

    images = load_manifest(inputs["dataset"]).count("train") if "dataset" in inputs else 0
    size = f"{worker_memory(config, step, reference_images=images) // 2**20}Mi"
    kuberay = compute.kuberay.model_copy(update={"memory_per_worker": size})
    return config.model_copy(update={"compute": compute.model_copy(update={"kuberay": kuberay})})


def _publish_config(config: Config, folder: RunFolder, step: str) -> tuple[str, str]:
    """URI and digest of the config for the other side, named after its content: other settings are other work."""
    here = {
        "compute": config.compute.model_copy(update={"backend": "local"}),
        "storage": config.storage.model_copy(update={"root": folder.root}),
    }
    text = to_yaml(config.model_copy(update=here))
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_CHARACTERS]
    uri = folder.step(step, f"config-{digest}.yaml")
    storage.write_text(uri, text)
    return uri, digest
