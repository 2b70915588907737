"""Between ingest and train, if asked: a search for better settings."""

from typing import NamedTuple

from kfp import dsl

from components import IMAGE
from components.task_config import PASSED_ON


@dsl.component(base_image=IMAGE, install_kfp_package=False, task_config_passthroughs=list(PASSED_ON))
def tune(
    config: str,
    run: str,
    dataset: dsl.Input[dsl.Dataset],
    search: dsl.Output[dsl.Artifact],
    plots: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    task_config: dsl.TaskConfig,
) -> NamedTuple("Chosen", [("best_config", str), ("best_run", str)]):  # type: ignore[valid-type]
    """Search for better settings; where the config has no search, hand on what was given."""
    from components import experiment, publish, publish_metrics, publish_nothing, publish_pictures, run_task

    settings, _ = experiment(config, run)
    if settings.search is None:
        publish_nothing(search, plots, metrics)
        return (config, run)
    from ncsn.config import to_json
    from ncsn.steps.tune import trainable
    from ncsn.storage import read_bytes

    result = run_task("tune", config, run, dataset=dataset, task_config=task_config)
    publish(search, result, uri=result.uri, config=result.config)
    publish_pictures(plots, {uri.rpartition("/")[2]: read_bytes(uri) for uri in result.plots})
    publish_metrics(metrics, {"tune/objective": result.objective, "tune/baseline": result.baseline})
    return (to_json(trainable(result, settings)), result.run)
