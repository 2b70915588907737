"""A step as a task of a pipeline: known to the cluster's janitor, told in the store, and not repeated in vain."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from ncsn.config import Config, to_json
from ncsn.errors import UserError
from ncsn.process import KFP_RUN_ID, this_kfp_run
from ncsn.runs.folder import RunFolder, run_folder
from ncsn.runs.records import Outcome, clear_outcome, read_error, read_mistake, recorded, write_outcome

if TYPE_CHECKING:
    from ncsn.remote.kubernetes import KubernetesApi

_TRY = "KFP_RETRY_INDEX"
"""Variable of KFP's: how often this task was tried before. KFP's own Retry counts from 0 again."""
_NOTE_SECONDS = 10.0


@contextmanager
def pipeline_task(config: Config, *, run: str, step: str, last: bool = False) -> Iterator[None]:
    """All that a task does for its step, whose failure is recorded whenever it comes.

    The outcome of the run, which an earlier attempt may have left, is removed first; a failure is the outcome, and so
    is the end of the last step. Where an exit handler follows, it says the same again. After KFP's Retry none follows.

    Args:
        config: The experiment.
        run: Name of the run.
        step: Name of the step.
        last: Whether the pipeline ends with it.

    Raises:
        ForeignRun: if the run belongs to another config.
        UserError: the mistake that an earlier try of this very task has found.
    """
    mistake = _mistake_before(run_folder(config, run), step)
    with recorded(config, run, step) as folder:
        if mistake is not None:
            raise mistake
        _note(config, run)
        clear_outcome(folder)
        try:
            yield
        except Exception as error:
            with suppress(OSError):  # a store that is away must not hide the first error
                write_outcome(folder, Outcome("FAILED", str(error), step))
            raise
        if last:
            write_outcome(folder, Outcome("FINISHED"))


def _mistake_before(folder: RunFolder, step: str) -> UserError | None:
    """What another try would only find again."""
    if not int(os.environ.get(_TRY) or 0):
        return None
    error = read_error(folder, step)
    same_run = error is not None and error.kfp_run == os.environ.get(KFP_RUN_ID)
    return read_mistake(folder, step) if same_run else None


def _note(config: Config, run: str) -> None:
    """Let the janitor know whose run it is to close if it is stopped in any way."""
    here = this_kfp_run()
    if here is not None:
        from ncsn.remote.orphans import NotedRun, note_run

        _tell(lambda api: note_run(api, NotedRun(here.id, here.workflow, run=run, config=to_json(config))))


def forget() -> None:
    """Let the janitor know that the run is closed."""
    here = this_kfp_run()
    if here is not None:
        from ncsn.remote.orphans import forget_run

        _tell(lambda api: forget_run(api, here))


def _tell(call: Callable[[KubernetesApi], None]) -> None:
    """Without a cluster that answers, or the right, the work goes on nevertheless."""
    # Imported here and not above: outside of a cluster nobody waits a second for it.
    from ncsn.remote.backend import say
    from ncsn.remote.kubernetes import KubernetesApi

    try:
        call(KubernetesApi(patience=_NOTE_SECONDS))
    except (OSError, ValueError) as error:
        say(f"could not register this run with the janitor: {error}")
