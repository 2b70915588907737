"""Step 2: the score network."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    config: str,
    run: str,
    dataset: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Train the score network on Ray, or resume it."""
    from components import experiment, publish, publish_metrics
    from ncsn.steps import train

    settings, name = experiment(config, run)
    result = train.run(settings, run=name, dataset=dataset.metadata["uri"])
    publish(checkpoint, result, uri=result.checkpoint, framework="pytorch")
    figures = {"images_seen": result.images_seen, "loss": result.loss, "images_per_second": result.images_per_second}
    publish_metrics(metrics, {f"train/{name}": value for name, value in figures.items()})
