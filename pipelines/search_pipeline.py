"""From raw images to better settings: ingest, tune. What it finds is a config for the train pipeline."""

from kfp import dsl

from components.finish import finish
from components.ingest import ingest
from components.tune import tune
from pipelines.tasks import configure_task


@dsl.pipeline(
    name="ncsn-search",
    display_name="NCSN: search for better settings",
    description="Searches noise levels, step size and whatever else the config's section `search` names, judged by the "
    "quality of samples, and hands over the best config for the train pipeline.",
)
def search_pipeline(config: str, run: str = "", content: str = "") -> None:
    """Search, and say how it ended, however it ended. The output `best_config` of the search is a config to train.

    Args:
        config: The whole experiment, with its section `search`, as canonical JSON (`ncsn show-config --json`) or YAML.
        run: Name of the run. The same name resumes; a name belongs to one experiment. Empty = the config's name and
            the id of this pipeline run.
        content: Fingerprint of the source's files, if known: KFP then takes the dataset from its cache.
    """
    finished = configure_task(finish(config=config, run=run), title="Finish", cached=False)
    with dsl.ExitHandler(finished, name="steps"):
        ingested = configure_task(ingest(config=config, run=run, content=content), title="Ingest images", cached=False)
        configure_task(
            tune(config=config, run=run, required=True, dataset=ingested.outputs["dataset"]),
            title="Search settings",
            cached=True,
        )
