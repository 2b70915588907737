"""Step 2: the score network."""

from kfp import dsl

from components import IMAGE
from components.task_config import PASSED_ON


@dsl.component(base_image=IMAGE, install_kfp_package=False, task_config_passthroughs=list(PASSED_ON))
def train(
    config: str,
    run: str,
    dataset: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    task_config: dsl.TaskConfig,
) -> None:
    """Train the score network on Ray, or resume it."""
    from components import publish, publish_metrics, run_task

    result = run_task("train", config, run, dataset=dataset, task_config=task_config)
    shown = f"checkpoint at {result.images_seen:,} images"
    publish(checkpoint, result, display_name=shown, uri=result.checkpoint, framework="pytorch")
    figures = {"images_seen": result.images_seen, "loss": result.loss, "images_per_second": result.images_per_second}
    publish_metrics(metrics, {f"train/{name}": value for name, value in figures.items()})
