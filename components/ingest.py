"""Step 1: images into the store."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ingest(config: str, run: str, dataset: dsl.Output[dsl.Dataset], metrics: dsl.Output[dsl.Metrics]) -> None:
    """Read the images into the store as Parquet, once per content."""
    from components import publish, publish_metrics
    from ncsn.config import from_json
    from ncsn.steps import ingest

    result = ingest.run(from_json(config), run=run)
    publish(dataset, result, uri=result.uri, digest=result.digest)
    publish_metrics(metrics, {f"ingest/{split}_images": count for split, count in result.counts.items()})
