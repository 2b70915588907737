"""The Fréchet distance of a few samples during training, made by its workers together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ncsn.config import Config
from ncsn.distributed.tasks import runner_of
from ncsn.errors import InvalidValue
from ncsn.evaluation.features import extractor_of
from ncsn.evaluation.frechet import FrechetStatistics, frechet_distance
from ncsn.evaluation.reference import load_reference, open_evaluator
from ncsn.model.checkpoint import TrainedNetwork
from ncsn.model.generate import generate
from ncsn.training.context import WorkerContext

# Other noise than that of the samples of the run, whose figures are reported.
_SEED = 2


@dataclass(frozen=True)
class SampleDistance:
    """Fréchet distance of the first samples of a seed to the training images; see `ncsn.training.loop.Distance`."""

    config: Config
    dataset: str  # URI
    reference: str  # fingerprint
    num_features: int

    def __call__(self, trained: TrainedNetwork, context: WorkerContext) -> float | None:
        """The distance, the same on all workers and for any number of them up to rounding."""
        config, total = self.config, self.config.train.validation.samples
        sampling = config.sampling.model_copy(
            # The guide need not be there, and averages of another width are made after training.
            update={"seed": (config.sampling.seed + _SEED) % 2**63, "guidance": None, "relative_width": None}
        )
        share = context.share(total)
        features = torch.zeros(total, self.num_features)
        broken = torch.zeros(1, device=context.device)
        with context.mistakes_shared():  # the extractor's files may be missing on one node alone
            extractor, reference = extractor_of(config, self.dataset), load_reference(self.dataset, self.reference)
        assert reference is not None, "the evaluator was opened before training"
        for first in range(share.start, share.stop, sampling.batch_size):
            count = min(sampling.batch_size, share.stop - first)
            try:
                images = generate(trained, sampling=sampling, first=first, count=count, device=context.device)
            except InvalidValue:  # not finite, as early weights may be
                broken += 1
                break
            features[first : first + count] = torch.from_numpy(extractor.extract(images).features)
        # Each row is one worker's, so the sum is exact.
        features = context.sum_over_workers(features.to(context.device)).cpu()
        if float(context.sum_over_workers(broken)) > 0:
            return None
        return frechet_distance(FrechetStatistics.of(features.numpy()), reference.statistics)


def sample_distance(config: Config, dataset: str) -> SampleDistance | None:
    """The measurement that `train.stop` or `train.best_by` asks for; None if they do not.

    Its extractor and reference are made on the connected cluster if the dataset lacks them.
    """
    if "fid" not in config.train.judges.values():
        return None
    evaluator = open_evaluator(config, dataset, runner=runner_of(config.compute))
    return SampleDistance(config, dataset, evaluator.reference.fingerprint, evaluator.extractor.num_features)
