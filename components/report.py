"""Step 6: the run as a page."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def report(config: str, run: str, evaluation: dsl.Input[dsl.Artifact], page: dsl.Output[dsl.HTML]) -> None:
    """Write one self-contained HTML page about the run."""
    from pathlib import Path

    from components import run_task
    from ncsn.storage import read_bytes

    result = run_task("report", config, run, evaluation=evaluation, last=True)
    Path(page.path).write_bytes(read_bytes(result.uri))
    page.metadata["uri"] = result.uri
