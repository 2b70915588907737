"""Step 4: the samples measured."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    config: str,
    run: str,
    dataset: dsl.Input[dsl.Dataset],
    samples: dsl.Input[dsl.Dataset],
    evaluation: dsl.Output[dsl.Artifact],
    scores: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Measure the samples, next to real test images."""
    from components import headline, publish, publish_metrics, publish_scores, task

    with task("evaluate", config=config, run=run) as (settings, name):
        from ncsn.steps import evaluate

        uris = {"samples": samples.metadata["uri"], "dataset": dataset.metadata["uri"]}
        result = evaluate.run(settings, run=name, **uris)
        publish(evaluation, result, uri=result.uri, fingerprint=result.fingerprint)
        publish_scores(scores, result.metrics, result.real_metrics)
        publish_metrics(metrics, headline({**result.metrics, **result.real_metrics}))
