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
    scores: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
    task_config: dsl.TaskConfig,
) -> None:
    """Measure the samples, next to real test images."""
    from components import headline, publish, publish_metrics, publish_scores, task

    with task("evaluate", config=config, run=run, task_config=task_config) as (settings, name):
        from ncsn.steps import evaluate

        uris = {"samples": samples.metadata["uri"], "dataset": dataset.metadata["uri"]}
        result = evaluate.run(settings, run=name, **uris)
        publish(evaluation, result, uri=result.uri, fingerprint=result.fingerprint)
        publish_scores(scores, result.metrics, result.real_metrics)
        publish_metrics(metrics, headline({**result.metrics, **result.real_metrics}))
