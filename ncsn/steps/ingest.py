"""Step 1: the images of the configured source as a dataset in the store."""

from __future__ import annotations

from dataclasses import dataclass

from ncsn import storage
from ncsn.config import Config
from ncsn.data.manifest import MANIFEST
from ncsn.data.parquet import write_dataset
from ncsn.data.source import source_fingerprint
from ncsn.data.sources import open_source
from ncsn.steps.progress import ProgressFile
from ncsn.steps.result import claim_run, once
from ncsn.tracking.run import step_run


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


def run(config: Config, *, run: str) -> IngestResult:
    """Bring the source's images to one shape and publish them under the digest of their content.

    Args:
        config: The experiment.
        run: Name of the run.

    Raises:
        FileNotFoundError: if the source's files are missing.
        ValueError: if they are damaged, do not fit the config, or the run name belongs to another config.
        OSError: if the disk is full. Nothing is left half-written.
    """
    folder = claim_run(config, run)
    source = config.data.source

    def work(progress: ProgressFile) -> IngestResult:
        with step_run(config, run=run, step="ingest") as tracked:
            # Named after the source, not the experiment, so that experiments on the same images share one dataset.
            datasets = storage.join(folder.root, "datasets", source)
            dataset = write_dataset(
                open_source(config.data), datasets, name=source, data=config.data, on_progress=progress
            )
            manifest = dataset.manifest
            tracked.log_dataset(manifest.name, digest=manifest.digest, uri=dataset.uri, profile=manifest.counts)
            tracked.log_metrics({f"ingest/{split}_images": count for split, count in manifest.counts.items()})
            return IngestResult(dataset.uri, manifest.digest, dict(manifest.counts), dataset.created)

    return once(
        folder,
        "ingest",
        inputs={"data": config.data.model_dump(mode="json"), "files": source_fingerprint(config.data)},
        result_type=IngestResult,
        outputs=lambda result: [storage.join(result.uri, MANIFEST)],
        unit="images",
        work=work,
    )
