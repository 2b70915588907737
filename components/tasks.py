"""The pipeline's steps as KFP components.

A running task does not import this file: KFP ships the source of one function, which imports what it needs inside.
"""

from functools import partial
from typing import List, NamedTuple  # noqa: UP035 - the form that KFP reads

from kfp import dsl

from components import IMAGE

# What is set on a task and meant for the pods that it starts. Addresses and volumes are for the task's own pod too,
# resources for it alone: the config sizes the others. kfp.local passes an empty TaskConfig.
_PASSED_ON = [
    dsl.TaskConfigPassthrough(field=field, apply_to_task=own)
    for field, own in (
        (dsl.TaskConfigField.KUBERNETES_NODE_SELECTOR, False),
        (dsl.TaskConfigField.KUBERNETES_TOLERATIONS, False),
        (dsl.TaskConfigField.KUBERNETES_AFFINITY, False),
        (dsl.TaskConfigField.RESOURCES, True),
        (dsl.TaskConfigField.ENV, True),
        (dsl.TaskConfigField.KUBERNETES_VOLUMES, True),
    )
]
_component = partial(dsl.component, base_image=IMAGE, install_kfp_package=False)
_may_start_pods = partial(_component, task_config_passthroughs=_PASSED_ON)


@_component
def ingest(
    config: str, run: str, content: str, dataset: dsl.Output[dsl.Dataset], metrics: dsl.Output[dsl.Metrics]
) -> None:
    """Read the images into the store as Parquet, once per content. KFP's cache looks at `content`."""
    from components import publish, publish_metrics, run_task

    result = run_task("ingest", config, run)
    publish(dataset, result, display_name=result.digest[:8], uri=result.uri, digest=result.digest, content=content)
    publish_metrics(metrics, {f"ingest/{split}_images": count for split, count in result.counts.items()})


@_may_start_pods
def search(
    config: str,
    run: str,
    dataset: dsl.Input[dsl.Dataset],
    search: dsl.Output[dsl.Artifact],
    plots: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    task_config: dsl.TaskConfig,
) -> NamedTuple("Chosen", [("best_config", str), ("best_run", str)]):  # type: ignore[valid-type]
    """Search for better settings; where the config has no search, hand on what was given."""
    from components import (
        config_and_run,
        publish,
        publish_metrics,
        publish_nothing,
        publish_pictures,
        read_own,
        run_task,
    )

    settings, _ = config_and_run(config, run)
    if settings.search is None:
        publish_nothing(search, plots, metrics)
        return (config, run)
    from ncsn.config import to_json
    from ncsn.steps.search import trainable

    result = run_task("search", config, run, dataset=dataset, task_config=task_config)
    publish(search, result, uri=result.uri, config=result.config)
    publish_pictures(plots, {uri.rpartition("/")[2]: read_own(config, uri) for uri in result.plots})
    publish_metrics(metrics, {"search/objective": result.objective, "search/baseline": result.baseline})
    return (to_json(trainable(result, settings)), result.run)


@_may_start_pods
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


@_may_start_pods
def sample(
    config: str,
    run: str,
    checkpoint: dsl.Input[dsl.Model],
    samples: dsl.Output[dsl.Dataset],
    sampled: dsl.Output[dsl.Model],
    pictures: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    task_config: dsl.TaskConfig,
) -> None:
    """Generate images by the configured sampler, from what `ncsn select` chose since, if it did."""
    from components import publish, publish_metrics, publish_pictures, read_own, run_task

    result = run_task("sample", config, run, checkpoint=checkpoint, task_config=task_config)
    publish(samples, result, display_name=f"{result.num_images:,} images", uri=result.uri)
    publish(sampled, result, display_name="checkpoint of the images", uri=result.checkpoint, framework="pytorch")
    publish_pictures(
        pictures, {"samples": read_own(config, result.grid), "level by level": read_own(config, result.strip)}
    )
    publish_metrics(metrics, {"sample/num_images": result.num_images, "sample/nfe": result.nfe})


@_may_start_pods
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
    from components import publish, publish_metrics, run_task
    from ncsn.runs.metrics import read_metrics

    result = run_task("evaluate", config, run, samples=samples, dataset=dataset, task_config=task_config)
    publish(evaluation, result, uri=result.uri, fingerprint=result.fingerprint)
    figures = [*read_metrics(result.metrics).items(), *read_metrics(result.real_metrics).items()]
    shown = ("excess", "score", "fid", "kid")  # KFP's page compares runs by them and their intervals
    publish_metrics(metrics, {figure.name: figure.value for name, figure in figures if name.startswith(shown)})


@_may_start_pods
def utility(
    config: str,
    run: str,
    checkpoint: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    comparison: dsl.Output[dsl.Artifact],
    pictures: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    task_config: dsl.TaskConfig,
) -> None:
    """Compare classifiers with and without generated images, where the config asks for it."""
    from components import (
        config_and_run,
        publish,
        publish_metrics,
        publish_nothing,
        publish_pictures,
        read_own,
        run_task,
    )

    settings, _ = config_and_run(config, run)
    if settings.utility is None:
        publish_nothing(comparison, pictures, metrics)
        return

    result = run_task("utility", config, run, checkpoint=checkpoint, dataset=dataset, task_config=task_config)
    publish(comparison, result, display_name=result.sentence, uri=result.uri)
    publish_pictures(pictures, {result.sentence: read_own(config, result.plot)})
    gain = result.gain
    publish_metrics(
        metrics, {"utility/gain_value": gain.value, "utility/gain_low": gain.low, "utility/gain_high": gain.high}
    )


@_may_start_pods
def export(
    config: str,
    run: str,
    checkpoint: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    exported: dsl.Output[dsl.Dataset],
    card: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
    task_config: dsl.TaskConfig,
) -> None:
    """Write a data set of generated images without copies; its card is the page."""
    from pathlib import Path

    from components import publish, publish_metrics, read_own, run_task

    result = run_task("export", config, run, checkpoint=checkpoint, dataset=dataset, task_config=task_config)
    images = sum(result.counts.values())
    publish(exported, result, display_name=f"{images:,} images", uri=result.uri)
    Path(card.path).write_bytes(read_own(config, result.card))
    publish_metrics(metrics, {"export/images": images, "export/copies": result.copies})


@_component
def register(
    config: str,
    run: str,
    checkpoint: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Register the EMA weights; they become champion if they beat the present one."""
    from components import publish, publish_metrics, run_task

    result = run_task("register", config, run, checkpoint=checkpoint, evaluation=evaluation)
    shown = f"{result.model} version {result.version}"
    publish(model, result, display_name=shown, uri=result.uri, framework="mlflow")
    publish_metrics(metrics, {"register/promoted": float(result.promoted)})


@_component
def report(config: str, run: str, evaluation: dsl.Input[dsl.Artifact], page: dsl.Output[dsl.HTML]) -> None:
    """Write one self-contained HTML page about the run."""
    from pathlib import Path

    from components import read_own, run_task

    result = run_task("report", config, run, evaluation=evaluation, last=True)
    Path(page.path).write_bytes(read_own(config, result.uri))
    page.metadata["uri"] = result.uri


@_component
def finish(
    config: str,
    run: str,
    page: dsl.Output[dsl.Markdown],
    outcome: dsl.Output[dsl.Artifact],
    status: dsl.PipelineTaskFinalStatus,
) -> None:
    """Cancel unfinished jobs, write the final status to the store and MLflow, and show where everything is."""
    from pathlib import Path

    from components import config_and_run, publish

    settings, name = config_and_run(config, run)
    from ncsn.environment import this_kfp_run
    from ncsn.kubeflow import finish
    from ncsn.kubeflow.janitor import forget_this_run

    result = finish.run(settings, run=name, state=status.state, message=status.error_message or "", kfp=this_kfp_run())
    publish(outcome, result, status=result.status)
    Path(page.path).write_text(result.page)
    if result.status != "KILLED":  # else the janitor looks once more, when the pods have had time to end
        forget_this_run()


@_component
def open_model(
    model: str,
    registry: str,
    root: str,
    overrides: List[str],  # noqa: UP006
    checkpoint: dsl.Output[dsl.Model],
) -> NamedTuple("Opened", [("config", str), ("run", str)]):  # type: ignore[valid-type]
    """Open a registered model as a run whose training is done; hand on its config with the overrides, and its name."""
    from components import publish
    from ncsn.config import from_yaml, to_json
    from ncsn.config.load import NOT_OF_MODELS
    from ncsn.errors import UserError
    from ncsn.runs.record import read_result
    from ncsn.runs.results import TrainResult
    from ncsn.steps.address import resolve
    from ncsn.storage import read_text

    run = resolve(model, key="model", root=root, registry=registry or None).as_run()
    if run is None:
        raise UserError("model", "is a checkpoint of no run", hint="name a version or a run", value=model)
    trained = read_result(run, TrainResult)
    assert trained is not None
    publish(checkpoint, run, display_name=model, uri=trained.checkpoint, framework="pytorch")
    here = [f"storage.root={run.root}", *([f"tracking.uri={registry}"] if registry else []), *overrides]
    config = from_yaml(read_text(run.config), overrides=here, origin=run.config, without=NOT_OF_MODELS)
    return (to_json(config), run.run)
