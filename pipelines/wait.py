"""Waits for a run: reports the states of its tasks, why a pod does not start, and why the run failed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import kfp_server_api
import urllib3

from ncsn.environment import RUN_ID_LABEL
from ncsn.errors import UserError
from ncsn.remote.kuberay import STANDALONE
from ncsn.remote.kubernetes import KubernetesApi
from ncsn.remote.pods import troubles_of_run
from ncsn.storage.retry import Retry
from pipelines import KfpError
from pipelines.submit import KfpConnection, reason_of

WELL_ENDED = ("SUCCEEDED", "SKIPPED")
ENDED = (*WELL_ENDED, "FAILED", "CANCELED")
POLL_SECONDS = 5.0
PATIENCE_SECONDS = 300  # for a server that is unavailable
LOOK_SECONDS = 15.0  # between two looks at the pods
_ARGO_SUFFIX = re.compile(r"\(\d+\)$")


class RunFailed(Exception):
    """A run did not succeed."""


def wait(
    connection: KfpConnection,
    run_id: str,
    *,
    say: Callable[[str], None],
    why: Callable[[], str] = lambda: "",
    poll_seconds: float = POLL_SECONDS,
) -> None:
    """Return when the run has succeeded.

    KFP's own wait does not notice that a canceled run has ended, and KFP does not notice that a pod cannot start. `say`
    gets each new state of the run and of its tasks, and what keeps a pod from starting; `why` gives the reason of a
    failure, which KFP does not know.

    Raises:
        RunFailed: It failed, its Workflow was deleted, or a pod will never start. Then the run is terminated.
    """
    page, pods, shown = connection.run_url(run_id), _Pods(connection, run_id, say), dict[str, str]()
    retry = Retry("Kubeflow Pipelines", PATIENCE_SECONDS, pauses=(poll_seconds, poll_seconds), say=say)
    while True:
        try:
            run = retry(partial(connection.client.get_run, run_id))
        except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError) as error:
            hint = "it may still be running; look at that page"
            raise KfpError(page, f"cannot watch this run any longer: {reason_of(error)}", hint=hint) from None
        document = run.pipeline_spec or {}
        spec = document.get("pipeline_spec", document)
        titles = {  # of tasks, without groups of tasks such as an exit handler
            name: task.get("taskInfo", {}).get("name", name)
            for component in (spec["root"], *spec["components"].values())
            for name, task in component.get("dag", {}).get("tasks", {}).items()
            if "executorLabel" in spec["components"][task["componentRef"]["name"]]
        }
        states = _states(run, titles)
        for name, state in {**states, "": run.state or "PENDING"}.items():
            if shown.get(name) != state:
                shown[name] = state
                say(f"{titles[name]}: {state}" if name else state)
        if run.state in WELL_ENDED:
            return
        if run.state in ENDED:
            failed = ", ".join(titles[name] for name, state in states.items() if state == "FAILED")
            said = run.error.message if run.error and run.error.message else ""
            reason = why() or " ".join(said.split())
            about = (f" ({failed})" if failed else "") + (f": {reason}" if reason else "")
            raise RunFailed(f"run {run_id} ended {run.state}{about}; see {page}")
        if hopeless := pods.look(titles):
            how = "was terminated"
            try:
                connection.client.terminate_run(run_id)
            except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError) as error:
                how = f"cannot go on and could not be terminated ({reason_of(error)})"
            raise RunFailed(f"run {run_id} {how}: {hopeless}; see {page}")
        if pods.absent >= 2:  # KFP does not notice it
            raise RunFailed(f"run {run_id} is over: {why() or 'its Workflow was deleted from the cluster'}; see {page}")
        time.sleep(poll_seconds)


class _Pods:
    """The pods of a run, if the cluster can be reached from here."""

    def __init__(self, connection: KfpConnection, run_id: str, say: Callable[[str], None]) -> None:
        self._labels, self._run_id, self._say = f"{RUN_ID_LABEL}={run_id}", run_id, say
        self._shown: dict[str, str] = {}
        self._final: set[str] = set()
        self._next, self._was_there = 0.0, False
        self.absent = 0  # looks in a row without the Workflow, once it was seen
        try:
            self._api: KubernetesApi | None = KubernetesApi(connection.namespace or STANDALONE, patience=LOOK_SECONDS)
        except UserError as error:
            self._give_up(error)

    def look(self, titles: Mapping[str, str]) -> str:
        """Report what keeps pods from starting; returns a reason that is final, seen twice in a row, or nothing."""
        if self._api is None or time.monotonic() < self._next:
            return ""
        self._next = time.monotonic() + LOOK_SECONDS
        try:
            troubles = troubles_of_run(self._api, self._run_id, pending=True)
        except (OSError, UserError) as error:
            self._give_up(error)
            return ""
        with suppress(OSError, UserError):  # pods may be read by more accounts than Workflows
            there = bool(self._api.find("workflows", labels=self._labels))
            self._was_there = self._was_there or there
            self.absent = 0 if there or not self._was_there else self.absent + 1
        before, self._final = self._final, {task for task, trouble in troubles.items() if trouble.final}
        for task, trouble in troubles.items():
            text = f"{titles.get(task, task)} cannot start: {trouble}"
            if self._shown.get(task) != trouble.reason:
                self._shown[task] = trouble.reason
                self._say(text)
            if trouble.final and task in before:
                return text
        return ""

    def _give_up(self, error: Exception) -> None:
        self._api = None
        self._say(f"cannot read the pods of this run, so why one does not start is not shown: {error}")


def _states(run: Any, titles: Mapping[str, str]) -> dict[str, str]:
    """Task -> state. KFP lists Argo's nodes: each task once as itself and once for each try, as `train(0)`."""
    details = (run.run_details.task_details if run.run_details else None) or []
    order = {"FAILED": 2, "RUNNING": 1}
    found: dict[str, str] = {}
    for name, state in ((_ARGO_SUFFIX.sub("", task.display_name or ""), task.state) for task in details):
        if name in titles and state and order.get(state, 0) >= order.get(found.get(name, ""), 0):
            found[name] = state
    return found
