"""Training by one worker as a plain Ray task.

Ray Train starts half a dozen processes around its workers, 15 CPU seconds or more each time. That is nothing for a
training, and most of a short trial of a search. One worker needs none of them: the loop is the same, the weights are
the same to the last bit, and a lost task is started again and resumes from the checkpoints in the store.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from ncsn import storage
from ncsn.distributed.tasks import call
from ncsn.model import checkpoint
from ncsn.model.checkpoint_store import newest_whole
from ncsn.training.context import LocalContext
from ncsn.training.loop import TrainingJob, TrainOutcome, train_loop


class StoreContext(LocalContext):
    """A single worker whose checkpoints lie in the store.

    Args:
        uri: Folder that receives the checkpoints; the last whole one by name is resumed from.
        device: Where to compute.
    """

    def __init__(self, uri: str, *, device: str = "cpu") -> None:
        super().__init__(Path(), device=device)
        self.uri = uri

    def latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The last whole folder, by name."""
        return newest_whole(
            [name for name in storage.list_names(self.uri) if storage.exists(self._marker(name))],
            opened=lambda name: storage.local_copy(storage.join(self.uri, name)),
            delete=lambda name: storage.delete_folder(storage.join(self.uri, name)),
        )

    def publish(self, write: Callable[[Path], None] | None, *, name: str, loss: float | None) -> None:  # noqa: ARG002
        """Write and publish; one that a lost attempt has published already stays, for it is the same."""
        assert write is not None
        with storage.scratch_folder(self.uri) as folder:
            write(folder)
            storage.publish_folder(folder, storage.join(self.uri, name), marker=checkpoint.INDEX)

    def _marker(self, name: str) -> str:
        return storage.join(self.uri, name, checkpoint.INDEX)


def train_alone(job: TrainingJob, *, checkpoints: str) -> TrainOutcome:
    """Train with one worker on the connected Ray cluster; the same `checkpoints` resumes from the latest.

    Args:
        job: What to train on what; its `compute.num_workers` is 1.
        checkpoints: URI of the folder of the checkpoints.

    Raises:
        ValueError: for a mistake that a repetition would only repeat, such as a divergence.
        ray.exceptions.RayError: if the worker was lost more often than `compute.max_failures`.
    """
    compute = job.config.compute
    assert compute.num_workers == 1, "several workers are Ray Train's"
    return call(
        _train,
        job,
        checkpoints,
        cpus=compute.cpus_per_worker,
        use_gpu=compute.use_gpu,
        retries=compute.max_failures,
    )


def _train(job: TrainingJob, checkpoints: str) -> TrainOutcome:
    return train_loop(job, StoreContext(checkpoints, device="cuda" if job.config.compute.use_gpu else "cpu"))
