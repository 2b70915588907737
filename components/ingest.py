"""Step 1: images into the store."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ingest(
    config: str, run: str, content: str, dataset: dsl.Output[dsl.Dataset], metrics: dsl.Output[dsl.Metrics]
) -> None:
    """Read the images into the store as Parquet, once per content. KFP's cache looks at `content`."""
    from components import publish, publish_metrics, run_task

    result = run_task("ingest", config, run)
    publish(dataset, result, display_name=result.digest[:8], uri=result.uri, digest=result.digest, content=content)
    publish_metrics(metrics, {f"ingest/{split}_images": count for split, count in result.counts.items()})
