"""The life of a step: claimed, found or done, here or on another machine, and recorded.

A step is idempotent: asked again with the same inputs it returns the stored result. Its result is JSON in the store, so
a launcher on another machine needs no back-channel.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ncsn import storage
from ncsn.config import Config, from_yaml, overrides_between, to_json, to_yaml
from ncsn.data.format import Manifest, load_manifest
from ncsn.errors import NotFound
from ncsn.process import CODE, WORKER_MEMORY, utc_now
from ncsn.progress import PublishedProgress
from ncsn.remote import open_backend
from ncsn.runs.folder import RunFolder, claim_run, read_mistake, read_step, require_owner, update_step
from ncsn.runs.steps import CONTINUING, STEPS_ELSEWHERE
from ncsn.storage.retry import limited

if TYPE_CHECKING:
    from ncsn.remote.backend import RemoteStep
    from ncsn.tracking.mlflow_runs import StepRun

MOST_STARTS = 10  # of a driver that gives its launcher up

R = TypeVar("R")


class Step(Generic[R]):
    """One step of a run, whose name belongs to its config from now on; `ForeignRun` if it is another's.

    Every step calls, in this order: `find_result`, with the inputs that decide it, and is done if there is one;
    `run_elsewhere`, if it is among `STEPS_ELSEWHERE`, and is done if it ran there; its work, within `work`; and
    `store_result`. `result` is a frozen dataclass of plain values.
    """

    def __init__(self, name: str, config: Config, run: str, result: Callable[..., R]) -> None:
        self.name, self.folder = name, claim_run(config, run)
        self._type = result
        self._inputs: dict[str, Any] | None = None  # not known to `launch`

    @property
    def last_lines(self) -> str:
        """URI of what the workers wrote last when the step failed."""
        return self.folder.step(self.name, "workers.txt")

    def fix_noise_levels(self, config: Config, manifest: Manifest) -> Config:
        """The config with the levels that `noise: auto` stands for, which the run keeps from now on."""
        if config.noise.kind != "auto" and storage.read_text(self.folder.config) == to_yaml(config):
            return config
        from ncsn.data.noise_levels import resolve_noise

        settled, owner = resolve_noise(config, manifest), self._owner()
        require_owner(resolve_noise(owner, manifest), settled, self.folder.run)
        if owner.noise != settled.noise:
            storage.write_text(self.folder.config, to_yaml(owner.model_copy(update={"noise": settled.noise})))
        return settled

    def set_length(self, config: Config) -> None:
        """Let the run's config have the length of this training, if that is longer."""
        owner, length = self._owner(), config.train.num_images
        if length > owner.train.num_images:
            train = owner.train.model_copy(update={"num_images": length})
            storage.write_text(self.folder.config, to_yaml(owner.model_copy(update={"train": train})))

    def _owner(self) -> Config:
        """The config that the run's name belongs to."""
        return from_yaml(storage.read_text(self.folder.config), origin=self.folder.config)

    def find_result(self, inputs: Mapping[str, Any], *, needs: Callable[[R], Sequence[str]]) -> R | None:
        """The stored result for these plain values that decide it; None if the work is to be done.

        `needs` gives the URIs without which a result is of no use. What took hours of training is not done again
        because a file is missing: `NotFound`.
        """
        self._inputs = json.loads(json.dumps(inputs))
        stored = self._stored()
        if stored is None:
            return None
        result = self._type(**stored)
        missing = next((uri for uri in needs(result) if not storage.exists(uri)), None)
        if missing is not None and self.name in CONTINUING:
            reason = f"it is gone, but the step {self.name} of run {self.folder.run!r} has finished"
            record = self.folder.step(self.name, "step.json")
            raise NotFound(missing, reason, hint=f"restore it, or delete {record} to {self.name} again")
        if missing is not None:
            return None
        if read_step(self.folder, self.name).state != "FINISHED":  # a later attempt had other inputs
            update_step(self.folder, self.name, state="FINISHED")
        return result

    def run_elsewhere(self, config: Config, options: Mapping[str, str]) -> R | None:
        """The result from where `compute.backend` says; None if the work is to be done here.

        The cluster runs the same command with these options, with the local backend and the same store.
        """
        folder, step = self.folder, self.name
        assert step in STEPS_ELSEWHERE
        backend = open_backend(_sized(config, step, options).compute)
        if backend is None:
            return None
        from ncsn.remote.backend import EndedByOther, RemoteFailure, RemoteLost, say

        backend.connect()  # before the store is changed
        remote = self.remote(config, options)
        for _ in range(MOST_STARTS):
            record = read_step(folder, step)
            # Another launcher may wait for the same request, and its driver may store the result right now.
            if record.request != remote.request or record.state not in {"RUNNING", "FINISHED"}:
                update_step(folder, step, state="RUNNING", error=None, request=remote.request)
            try:
                backend.execute(remote)
            except RemoteFailure as failure:
                if (mistake := read_mistake(folder, step)) is not None:
                    raise mistake from failure
                if isinstance(failure, RemoteLost) and self._stored() is not None:
                    break
                if not isinstance(failure, EndedByOther):
                    raise
                say(f"{failure}; this run goes on: the step {step} starts again where it was")
                continue
            if read_step(folder, step).state != "KILLED":
                break
            # The store was away from here for longer than the lease, and the driver gave this process up.
            say(f"the step {step} ended without this launcher; it starts again where it was")
        stored = self._stored()
        if stored is None:
            where = "compute.kuberay.image" if config.compute.backend == "kuberay" else "the cluster"
            raise RuntimeError(
                f"step {step} ended on the cluster without a result for these inputs in {folder.uri}/steps/{step}; "
                f"does {where} have this version of ncsn, and does the cluster reach this store?"
            )
        update_step(folder, step, request=remote.request)
        return self._type(**stored)

    def remote(self, config: Config, options: Mapping[str, str]) -> RemoteStep:
        """The step as its backend gets it."""
        from ncsn.remote.backend import RemoteStep

        folder, step = self.folder, self.name
        root = {"storage": config.storage.model_copy(update={"root": folder.root})}
        compute = config.compute.model_copy(update={"backend": "local"})
        there = config.model_copy(update={**root, "compute": compute})
        settings = [f"storage.root={folder.root}", *overrides_between(self._owner().model_copy(update=root), there)]
        code = os.environ.get(CODE)
        return RemoteStep(
            run=folder.run,
            step=step,
            uri=storage.join(folder.steps, step),
            command=(
                # Of archived code the cluster's environment has no command.
                *(("python", "-P", "-m", "ncsn") if code else ("ncsn",)),
                *(step, "--run", folder.run),
                *(part for setting in settings for part in ("--set", setting)),
                *(part for name, value in options.items() for part in (f"--{name}", value)),
                *(("--code", code) if code else ()),
                "--json",
            ),
            code=code,
            facts={
                "ncsn.config": storage.digest(to_json(there), 12),
                "mlflow.experiment": config.tracking.experiment,
                "mlflow.run_name": f"{folder.run}/{step}",
            },
            mistaken=lambda: read_mistake(folder, step) is not None,
            told=lambda: _told(folder, step),
            resumes=lambda: _resumes(folder, step),
        )

    @contextmanager
    def work(self, config: Config, *, lease: str | None = None) -> Iterator[tuple[PublishedProgress, StepRun]]:
        """The progress of the step, which ends the work when the launcher of `lease` is gone, and its MLflow run.

        That ends with the block. The seconds are added to those of the step.
        """
        from ncsn.tracking.mlflow_runs import step_run

        folder, started = self.folder, time.time()
        update_step(folder, self.name, state="RUNNING")
        with step_run(config, run=folder.run, step=self.name) as tracked:
            try:
                yield PublishedProgress(folder.step(self.name, "progress.json"), lease=lease), tracked
            finally:
                with suppress(OSError):  # a full disk must not hide the first error
                    seconds = read_step(folder, self.name).seconds + time.time() - started
                    update_step(folder, self.name, seconds=round(seconds, 3))

    def store_result(self, result: R) -> R:
        """Store the result, which makes the step complete."""
        values = dataclasses.asdict(result)  # type: ignore[call-overload]
        finished = {"state": "FINISHED", "error": None, "finished_at": utc_now()}
        update_step(self.folder, self.name, inputs=self._inputs, result=values, **finished)
        return result

    def _stored(self) -> Mapping[str, Any] | None:
        """The stored result, if it is of the same inputs."""
        stored = read_step(self.folder, self.name)
        ours = stored.state == "FINISHED" if self._inputs is None else stored.inputs == self._inputs
        return stored.result if stored.result and ours else None


def launch(name: str, config: Config, run: str, inputs: Mapping[str, str]) -> Any:
    """The result of a step that runs elsewhere, from an environment without torch, such as that of the slim image.

    What the step itself would check or find before it is sent away, its driver does. A launcher that has the same
    request again takes the result, if its files are there.
    """

    def result(**values: Any) -> Any:
        return dataclasses.make_dataclass(name, values)(**values)

    step = Step(name, config, run, result)
    record = read_step(step.folder, name)
    files = [uri for uri in record.result.values() if str(uri).startswith(f"{step.folder.root}/")]
    done = record.state == "FINISHED" and all(map(storage.exists, files))
    if done and record.request == step.remote(config, inputs).request:
        return result(**record.result)
    return step.run_elsewhere(config, inputs)


def _told(folder: RunFolder, step: str) -> str | None:
    """Why the step failed, as its driver has recorded it."""
    record = read_step(folder, step)
    return f"{record.error.kind}: {record.error.message}" if record.error and record.state == "FAILED" else None


def _resumes(folder: RunFolder, step: str) -> str:
    """What the next driver of the step does, as a clause. Without torch, which the pod of a launcher may lack."""
    if step != "train":
        return f"the step {step} goes on with what is stored"
    newest = "its last checkpoint"
    with suppress(OSError), limited(0):
        found = (name for name in storage.list_names(folder.checkpoints) if re.fullmatch(r"[a-z]+-\d+", name))
        names = sorted(found, key=lambda name: int(name.partition("-")[2]), reverse=True)
        whole = (storage.join(folder.checkpoints, name) for name in names)
        newest = next((uri for uri in whole if storage.exists(storage.join(uri, "checkpoint.json"))), "the start")
    return f"training resumes from {newest}"


def _sized(config: Config, step: str, inputs: Mapping[str, str]) -> Config:
    """The config with memory for its workers."""
    compute = config.compute
    if compute.backend != "kuberay" or compute.kuberay.memory_per_worker is not None:
        return config
    size = os.environ.get(WORKER_MEMORY)
    if size is None:
        from ncsn.model.memory import worker_memory

        images = load_manifest(inputs["dataset"]).count("train") if "dataset" in inputs else 0
        size = f"{worker_memory(config, step, reference_images=images) // 2**20}Mi"
    kuberay = compute.kuberay.model_copy(update={"memory_per_worker": size})
    return config.model_copy(update={"compute": compute.model_copy(update={"kuberay": kuberay})})
