"""Steps that run on another machine: the same command there, with the local backend, on the same store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

from ncsn import storage
from ncsn.cluster.backend import RemoteFailure, RemoteLost, RemoteStep, open_backend
from ncsn.config import Config, to_yaml
from ncsn.data.format import load_manifest
from ncsn.errors import UserError
from ncsn.runs.folder import RunFolder
from ncsn.runs.records import clear_outcome
from ncsn.steps.result import stored_mistake

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
