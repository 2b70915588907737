"""Step 4: the samples measured."""

from kfp import dsl

from components import IMAGE
from components.task_config import PASSED_ON


@dsl.component(base_image=IMAGE, install_kfp_package=False, task_config_passthroughs=list(PASSED_ON))
def evaluate(
    config: str,
    run: str,
    dataset: dsl.Input[dsl.Dataset],
    samples: dsl.Input[dsl.Dataset],
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    task_config: dsl.TaskConfig,
) -> None:
    """Measure the samples, next to real test images."""
    from components import headline, publish, publish_metrics, run_task

    result = run_task("evaluate", config, run, samples=samples, dataset=dataset, task_config=task_config)
    publish(evaluation, result, uri=result.uri, fingerprint=result.fingerprint)
    publish_metrics(metrics, headline({**result.metrics, **result.real_metrics}))
