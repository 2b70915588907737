"""The end, also of a run that failed: nothing left running, and the outcome where people look."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def finish(
    config: str,
    run: str,
    page: dsl.Output[dsl.Markdown],
    outcome: dsl.Output[dsl.Artifact],
    status: dsl.PipelineTaskFinalStatus,
) -> None:
    """Cancel unfinished jobs, write the final status to the store and MLflow, and show where everything is."""
    from pathlib import Path

    from components import experiment, publish

    settings, name = experiment(config, run)
    from ncsn.process import this_kfp_run
    from ncsn.steps import finish
    from ncsn.steps.janitor import forget_this_run

    result = finish.run(settings, run=name, state=status.state, message=status.error_message or "", kfp=this_kfp_run())
    publish(outcome, result, status=result.status)
    Path(page.path).write_text(result.page)
    if result.status != "KILLED":  # else the janitor looks once more, when the pods have had time to end
        forget_this_run()
