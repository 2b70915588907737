"""A step on other machines: the command that its backend runs there, and the wait for its result in the store.

The result is JSON in the store, so a launcher needs no back-channel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ncsn import storage
from ncsn.config import Config, overrides_between, to_json
from ncsn.data.format import load_manifest
from ncsn.environment import CODE, WORKER_MEMORY
from ncsn.errors import UserError
from ncsn.progress import say
from ncsn.remote import open_backend
from ncsn.remote.backend import EndedByOther, RemoteFailure, RemoteLost, RemoteStep
from ncsn.runs.layout import RunFolder
from ncsn.runs.record import Finished, read_attempt, read_finished
from ncsn.runs.run import Run
from ncsn.runs.steps import STEP_TABLE

MOST_STARTS = 10  # of a driver that gives its launcher up


def do_elsewhere(
    step: str,
    run: Run,
    config: Config,
    inputs: Mapping[str, str],
    key: Mapping[str, Any] | None,
    begin: Callable[..., None],
) -> Any:
    """Run the step where `compute.backend` says, until its result for this key is in the store, and return it.

    The key is None where only the driver of the step knows it.

    The cluster runs the command of the step with these inputs, with the local backend and the same store. `begin`
    writes the record once a job does the request, and not if one with other inputs is in the way.
    """
    folder = run.folder
    remote = remote_step(step, run, config, inputs)
    backend = open_backend(_sized(config, step, inputs).compute)
    assert backend is not None
    backend.connect()  # before the store is changed
    for _ in range(MOST_STARTS):
        accepted = partial(begin, remote.request, read_attempt(folder, step))
        try:
            backend.execute(remote, accepted)
        except RemoteFailure as failure:
            if (told := remote.told()) and told.problems:
                raise UserError.of(told.problems) from failure
            if isinstance(failure, RemoteLost) and _stored(folder, step, key):
                break
            if not isinstance(failure, EndedByOther):
                raise
            say(f"{failure}; this run goes on: the step {step} starts again where it was")
            continue
        if read_attempt(folder, step).state != "KILLED":
            break
        # The store was away from here for longer than the lease, and the driver gave this process up.
        say(f"the step {step} ended without this launcher; it starts again where it was")
    if (finished := _stored(folder, step, key)) is None:
        where = "compute.kuberay.image" if config.compute.backend == "kuberay" else "the cluster"
        raise RuntimeError(
            f"step {step} ended on the cluster without a result for these inputs in {folder.step(step, '')}; "
            f"does {where} have this version of ncsn, and does the cluster reach this store?"
        )
    return finished.result


def _stored(folder: RunFolder, step: str, key: Mapping[str, Any] | None) -> Finished | None:
    """The stored result of this key; where it is not known, that of the last attempt."""
    finished = read_finished(folder, step)
    if finished is None:
        return None
    ours = read_attempt(folder, step).state == "FINISHED" if key is None else finished.key == key
    return finished if ours else None


def remote_step(step: str, run: Run, config: Config, inputs: Mapping[str, str]) -> RemoteStep:
    """The step as its backend gets it."""
    folder, code = run.folder, os.environ.get(CODE)
    root = {"storage": config.storage.model_copy(update={"root": folder.root})}
    compute = config.compute.model_copy(update={"backend": "local"})
    there = config.model_copy(update={**root, "compute": compute})
    settings = [f"storage.root={folder.root}", *overrides_between(run.owner.model_copy(update=root), there)]
    command = [
        # Of archived code the cluster's environment has no command.
        *(("python", "-P", "-m", "ncsn") if code else ("ncsn",)),
        *(step, "--run", folder.run),
        *(part for setting in settings for part in ("--set", setting)),
        *(part for name, value in inputs.items() for part in (f"--{name}", value)),
        *(("--code", code) if code else ()),
        "--json",
    ]
    facts = {
        "ncsn.config": storage.digest(to_json(there), 12),
        "mlflow.experiment": config.tracking.experiment,
        "mlflow.run_name": f"{folder.run}/{step}",
    }
    return RemoteStep(folder.root, folder.run, step, tuple(command), code, facts)


def _sized(config: Config, step: str, inputs: Mapping[str, str]) -> Config:
    """The config with memory for its workers."""
    compute = config.compute
    if compute.backend != "kuberay" or compute.kuberay.memory_per_worker is not None:
        return config
    size = os.environ.get(WORKER_MEMORY)
    if size is None:
        from ncsn.model.memory import worker_memory

        images = load_manifest(inputs["dataset"]).count("train") if "dataset" in inputs else 0
        size = f"{worker_memory(config, STEP_TABLE[step].workers, reference_images=images) // 2**20}Mi"
    kuberay = compute.kuberay.model_copy(update={"memory_per_worker": size})
    return config.model_copy(update={"compute": compute.model_copy(update={"kuberay": kuberay})})
