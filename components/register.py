"""Step 5: the model in the registry."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
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
