"""`ncsn likelihood`: bits per dimension of test images under a trained network."""

from __future__ import annotations

from dataclasses import dataclass

from ncsn.config import Config
from ncsn.config.rules import likelihood_problems
from ncsn.distributed.cluster import cluster_for, ray_tags
from ncsn.distributed.likelihood import Likelihood, plan_likelihood
from ncsn.errors import UserError
from ncsn.model.averages import sampled_checkpoint
from ncsn.steps.step import Step


@dataclass(frozen=True)
class LikelihoodResult(Likelihood):
    """The likelihood of images under a checkpoint."""

    checkpoint: str


def run(config: Config, *, run: str, checkpoint: str, dataset: str, images: int | None = None) -> LikelihoodResult:
    """Measure test images under the EMA weights of a checkpoint, as `evaluation.likelihood` says.

    `images` replaces its number of images.
    """
    if problems := list(likelihood_problems(config)):
        raise UserError.of(problems)
    step = Step.claim("likelihood", config, run, LikelihoodResult, unit="images")
    checkpoint = sampled_checkpoint(checkpoint, config)
    plan = plan_likelihood(config, checkpoint=checkpoint, dataset=dataset, images=images)
    inputs = {"checkpoint": plan.weights, "dataset": plan.dataset, "settings": plan.settings.model_dump(mode="json")}
    if result := step.found(inputs, needs=lambda _: []):
        return result
    with step.work(config) as work, cluster_for(config, tasks=len(plan.shards), metadata=work.job_metadata()):
        work.tracked.set_tags({**ray_tags(), "checkpoint.uri": checkpoint, "checkpoint.digest": plan.weights})
        done = 0

        def on_images(number: int) -> None:
            nonlocal done
            done += number
            work.progress(done, plan.settings.images)

        found = plan.measure(on_images=on_images)
        work.tracked.log_metrics(found.metrics)
        work.tracked.set_tags({"likelihood.fingerprint": found.fingerprint})
    return step.done(LikelihoodResult(checkpoint=checkpoint, **vars(found)))
