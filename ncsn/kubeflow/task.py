"""What a task of KFP does around its step: the janitor knows of it, and its failure is the end of the run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

from ncsn import storage
from ncsn.answer import TERMINATED
from ncsn.environment import KFP_RUN_ID, this_kfp_run
from ncsn.errors import UserError
from ncsn.events import tell
from ncsn.runs.record import ForeignRun, Outcome, read_attempt, update_attempt, write_end, write_outcome
from ncsn.runs.run import Run
from ncsn.runs.steps import FIRST
from ncsn.steps.execute import Observer

_TRY = "KFP_RETRY_INDEX"  # KFP's: how often this task was tried before. KFP's own Retry counts from 0 again.
_LOOK_SECONDS = 10.0


class Task(Observer):
    """The observer of a task's step; the end of the `last` one is that of the run."""

    def __init__(self, step: str, run: Run, *, last: bool) -> None:
        run.claim()  # so that a refusal is recorded too
        self._last, self._mistake = last, None
        error = read_attempt(run.folder, step).error
        again = int(os.environ.get(_TRY) or 0)
        if again and error is not None and error.problems and error.kfp_run == os.environ.get(KFP_RUN_ID):
            self._mistake = UserError.of(error.problems)

    def started(self, step: str, run: Run, inputs: Mapping[str, str]) -> None:  # noqa: ARG002
        """Tell the janitor and the webhook of the run, once; another try does not repeat a mistake."""
        if self._mistake is not None:
            raise self._mistake
        first = step == FIRST
        if this_kfp_run() is not None:  # then there is a cluster, whose client takes a while to import
            from ncsn.kubeflow.janitor import note_run

            first = note_run(run.config, run.name)
        if first:
            tell("started", run=run.name, root=run.folder.root)
        storage.delete(_refused(run))  # of an earlier try, beside a job with other inputs

    def begun(self, run: Run) -> None:
        """A run whose step works has not ended."""
        storage.delete(run.folder.status)

    def ended(self, step: str, run: Run, *, again: bool) -> None:  # noqa: ARG002
        """Write the end of the run."""
        if self._last:
            write_outcome(run.folder, Outcome("FINISHED"))

    def failed(self, step: str, run: Run, error: BaseException) -> None:
        """Write it as the end of the run: the exit handler does too, but after KFP's Retry there is none."""
        if isinstance(error, ForeignRun):
            if KFP_RUN_ID in os.environ:  # for the exit handler, which leaves the run as it is too
                storage.write_text(_refused(run), str(error))
        elif isinstance(error, Exception):
            if _terminated():  # the janitor may delete a RayJob before Argo ends this process
                update_attempt(run.folder, step, state="KILLED")
                raise SystemExit(TERMINATED) from error
            write_end(run.config, [run.folder], step, error)


def _refused(run: Run) -> str:
    return run.folder.step(FIRST, f"refused-{os.environ.get(KFP_RUN_ID)}")


def _terminated() -> bool:
    """Whether a person has ended the pipeline run of this process."""
    here = this_kfp_run()
    if here is None:
        return False
    from ncsn.remote.kubernetes import KubernetesApi, was_stopped

    with suppress(OSError, UserError):
        return was_stopped(KubernetesApi(patience=_LOOK_SECONDS).get("workflows", here.workflow))
    return False
