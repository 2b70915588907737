"""From raw images to a registered model: ingest, train, sample, evaluate, register."""

from kfp import dsl

from components.evaluate import evaluate
from components.ingest import ingest
from components.register import register
from components.sample import sample
from components.train import train


@dsl.pipeline(
    name="ncsn-train",
    display_name="NCSN: train and register",
    description="Trains a noise conditional score network (Song & Ermon 2019), samples from it by annealed Langevin "
    "dynamics, measures the samples and registers the model.",
)
def train_pipeline(config: str, run: str) -> None:
    """Train, sample, evaluate and register one experiment.

    Args:
        config: The whole experiment as canonical JSON (`ncsn show-config --json`) or YAML.
        run: Name of the run. The same name resumes; a name belongs to one experiment.
    """
    ingested = ingest(config=config, run=run)
    trained = train(config=config, run=run, dataset=ingested.outputs["dataset"])
    sampled = sample(config=config, run=run, checkpoint=trained.outputs["checkpoint"])
    evaluated = evaluate(
        config=config, run=run, dataset=ingested.outputs["dataset"], samples=sampled.outputs["samples"]
    )
    registered = register(
        config=config, run=run, checkpoint=trained.outputs["checkpoint"], evaluation=evaluated.outputs["evaluation"]
    )
    names = {
        "Ingest images": ingested,
        "Train score network": trained,
        "Sample images": sampled,
        "Evaluate samples": evaluated,
        "Register model": registered,
    }
    for name, task in names.items():
        task.set_display_name(name)
        # Steps are idempotent by the content of their inputs; KFP's cache knows only the argument strings.
        task.set_caching_options(False)
