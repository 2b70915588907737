"""From a registered model to images, measured if asked."""

from typing import List  # noqa: UP035 - the form that KFP reads

from kfp import dsl

from components.evaluate import evaluate
from components.ingest import ingest
from components.sample_model import sample_model
from pipelines.tasks import configure_task


@dsl.pipeline(
    name="ncsn-sample",
    display_name="NCSN: sample a registered model",
    description="Generates images from a model in MLflow's registry by any sampler, and measures them if asked.",
)
def sample_pipeline(
    model: str,
    root: str,
    registry: str = "",
    overrides: List[str] = [],  # noqa: UP006, B006 - a default of the form, which nothing changes
    evaluated: bool = False,  # noqa: FBT001, FBT002
) -> None:
    """Sample a registered model.

    Args:
        model: `models:/NAME@champion`, or another alias or version.
        root: Store for the images: `<root>/generated/<name>/<version>/<settings>`.
        registry: Tracking server; empty = that of the cluster's environment.
        overrides: `a.b=value` for the config that is registered with the model, such as `sampling.num_images=1000`.
        evaluated: Measure the images too, for which the model's dataset is ingested if the store does not have it.
    """
    # Not cached: who is champion changes without any argument.
    sampled = configure_task(
        sample_model(model=model, registry=registry, root=root, overrides=overrides),
        title="Sample images",
        cached=False,
    )
    with dsl.If(evaluated == True, name="if evaluated"):  # noqa: E712 - KFP records the comparison
        config, run = sampled.outputs["config"], sampled.outputs["run"]
        ingested = configure_task(ingest(config=config, run=run, content=""), title="Ingest images", cached=False)
        configure_task(
            evaluate(config=config, run=run, dataset=ingested.outputs["dataset"], samples=sampled.outputs["samples"]),
            title="Evaluate samples",
            cached=False,
        )
