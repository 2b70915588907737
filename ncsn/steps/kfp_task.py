"""A step as a task of a pipeline: registered with the janitor, recorded in the store, and not repeated for nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ncsn.config import Config, to_json
from ncsn.errors import UserError
from ncsn.process import KFP_RUN_ID, this_kfp_run
from ncsn.runs.folder import RunFolder, run_folder
from ncsn.runs.records import Outcome, clear_outcome, read_mistake, read_step, recorded, write_outcome
from ncsn.steps.run import run_step

if TYPE_CHECKING:
    from ncsn.remote.kubernetes import KubernetesApi

# Variable of KFP's: how often this task was tried before. KFP's own Retry counts from 0 again.
_TRY = "KFP_RETRY_INDEX"
_NOTE_SECONDS = 10.0


def run_task(step: str, config: Config, *, run: str, given: Mapping[str, str], last: bool = False) -> Any:
    """The result of a task's step; its failure, or the end of the `last` step, becomes the outcome of the run."""
    # The exit handler writes the same outcome again, but after KFP's Retry there is none.
    mistake = _mistake_before(run_folder(config, run), step)
    with recorded(config, run, step) as folder:
        if mistake is not None:
            raise mistake
        _note(config, run)
        clear_outcome(folder)
        try:
            result = run_step(step, config, run=run, given=given)
        except Exception as error:
            with suppress(OSError):  # an unreachable store must not hide the first error
                write_outcome(folder, Outcome("FAILED", str(error), step))
            raise
        if last:
            write_outcome(folder, Outcome("FINISHED"))
        return result


def _mistake_before(folder: RunFolder, step: str) -> UserError | None:
    """The mistake that another try would only repeat."""
    if not int(os.environ.get(_TRY) or 0):
        return None
    error = read_step(folder, step).error
    same_run = error is not None and error.kfp_run == os.environ.get(KFP_RUN_ID)
    return read_mistake(folder, step) if same_run else None


def _note(config: Config, run: str) -> None:
    """Tell the janitor which run to close if this pipeline is stopped."""
    here = this_kfp_run()
    if here is not None:
        from ncsn.remote.orphans import NotedRun, note_run

        _tell(lambda api: note_run(api, NotedRun(here.id, here.workflow, run=run, config=to_json(config))))


def forget() -> None:
    """Tell the janitor that the run is closed."""
    here = this_kfp_run()
    if here is not None:
        from ncsn.remote.orphans import forget_run

        _tell(lambda api: forget_run(api, here))


def _tell(call: Callable[[KubernetesApi], None]) -> None:
    """Call the cluster; without an answer or the right, only say so."""
    from ncsn.remote.backend import say
    from ncsn.remote.kubernetes import KubernetesApi

    try:
        call(KubernetesApi(patience=_NOTE_SECONDS))
    except (OSError, UserError) as error:
        say(f"could not register this run with the janitor: {error}")
