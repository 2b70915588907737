"""Step 1: the images of the configured source as a dataset in the store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ncsn import storage
from ncsn.config import Config
from ncsn.data.manifest import MANIFEST
from ncsn.data.parquet import write_dataset
from ncsn.data.sources import open_source
from ncsn.steps import result as results
from ncsn.steps.progress import ProgressFile


@dataclass(frozen=True)
class IngestResult:
    """The dataset.

    Attributes:
        uri: Its folder in the store.
        digest: Digest of its content.
        counts: Images of each split.
        created: False if the store held this content already, so nothing was written.
    """

    uri: str
    digest: str
    counts: dict[str, int]
    created: bool


def run(config: Config, *, run: str, on_progress: Callable[[int, int], None] | None = None) -> IngestResult:
    """Bring the source's images to one shape and publish them under the digest of their content.

    Args:
        config: The experiment.
        run: Name of the run.
        on_progress: Called with (images done, images in all).

    Raises:
        FileNotFoundError: if the source's files are missing.
        ValueError: if they are damaged, do not fit the config, or the run name belongs to another config.
        OSError: if the disk is full. Nothing is left half-written.
    """
    folder = results.claim_run(config, run)

    def work(progress: ProgressFile) -> IngestResult:
        def report(done: int, total: int) -> None:
            progress(done, total)
            if on_progress is not None:
                on_progress(done, total)

        # Named after the source, not the experiment, so that experiments on the same images share one dataset.
        datasets = storage.join(folder.root, "datasets", config.data.source)
        dataset = write_dataset(
            open_source(config.data), datasets, name=config.data.source, data=config.data, on_progress=report
        )
        manifest = dataset.manifest
        return IngestResult(dataset.uri, manifest.digest, dict(manifest.counts), dataset.created)

    return results.once(
        folder,
        "ingest",
        inputs={"data": config.data.model_dump(mode="json")},
        result_type=IngestResult,
        outputs=lambda result: [storage.join(result.uri, MANIFEST)],
        unit="images",
        work=work,
    )
