"""From raw images to a registered model: ingest, tune if asked, train, sample, evaluate, register, report."""

from kfp import dsl

from components.evaluate import evaluate
from components.finish import finish
from components.ingest import ingest
from components.register import register
from components.report import report
from components.sample import sample
from components.train import train
from components.tune import tune
from pipelines.tasks import configure_task


@dsl.pipeline(
    name="ncsn-train",
    display_name="NCSN: train and register",
    description="Trains a noise conditional score network (Song & Ermon 2019), samples from it by annealed Langevin "
    "dynamics, measures the samples and registers the model.",
)
def train_pipeline(config: str, run: str = "", content: str = "") -> None:
    """Train, sample, evaluate and register one experiment, and say how it ended, however it ended.

    If the config has a section `search`, better settings are searched first, and what was found is trained under the
    run's name with `-best` behind it.

    Args:
        config: The whole experiment as canonical JSON (`ncsn show-config --json`) or YAML.
        run: Name of the run. The same name resumes; a name belongs to one experiment. Empty = the config's name and
            the id of this pipeline run.
        content: Fingerprint of the source's files, if known: KFP then takes the dataset from its cache.
    """
    finished = configure_task(finish(config=config, run=run), title="Finish", cached=False)
    with dsl.ExitHandler(finished, name="steps"):
        # Not cached unless `ncsn submit` knows the content: KFP sees the same config and not that images changed.
        ingested = configure_task(ingest(config=config, run=run, content=content), title="Ingest images", cached=False)
        dataset = ingested.outputs["dataset"]
        # A task and not a branch: only a task that reads the config knows whether it asks for a search.
        tuned = configure_task(
            tune(config=config, run=run, dataset=dataset),
            title="Search settings, if asked",
            cached=True,
        )
        config, run = tuned.outputs["best_config"], tuned.outputs["best_run"]
        trained = configure_task(
            train(config=config, run=run, dataset=dataset), title="Train score network", cached=True
        )
        # Not cached: `ncsn select` may have chosen another checkpoint since. The store has the images of this one.
        sampled = configure_task(
            sample(config=config, run=run, checkpoint=trained.outputs["checkpoint"]),
            title="Sample images",
            cached=False,
        )
        # Not cached: KFP takes the images of each run for new ones. The store has the results of the same images.
        evaluated = configure_task(
            evaluate(config=config, run=run, dataset=dataset, samples=sampled.outputs["samples"]),
            title="Evaluate samples",
            cached=False,
        )
        # Not cached: the gate compares with the present champion.
        registered = configure_task(
            register(
                config=config,
                run=run,
                checkpoint=sampled.outputs["sampled"],
                evaluation=evaluated.outputs["evaluation"],
            ),
            title="Register model",
            cached=False,
        )
        # After the gate, whose decision the page shows.
        reporting = report(config=config, run=run, evaluation=evaluated.outputs["evaluation"]).after(registered)
        configure_task(reporting, title="Write report", cached=False)
