"""Step 6: the run as a page."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def report(config: str, run: str, evaluation: dsl.Input[dsl.Artifact], page: dsl.Output[dsl.HTML]) -> None:
    """Write one self-contained HTML page about the run."""
    from pathlib import Path

    from components import task

    with task("report", config=config, run=run, last=True) as (settings, name):
        from ncsn.steps import report
        from ncsn.storage import read_bytes

        result = report.run(settings, run=name, evaluation=evaluation.metadata["uri"])
        Path(page.path).write_bytes(read_bytes(result.uri))
        page.metadata["uri"] = result.uri
