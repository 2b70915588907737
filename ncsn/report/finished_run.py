"""A finished run, opened to make new images with its network: completions, and quality over NFE."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from ncsn.config import Config
from ncsn.config.schema import SamplingConfig
from ncsn.core.keyed_random import keyed_permutation
from ncsn.core.noise_schedule import consistent_epsilon
from ncsn.core.samplers.base import Sampler
from ncsn.core.samplers.ode import ProbabilityFlow
from ncsn.core.samplers.stochastic import AnnealedLangevin, Langevin
from ncsn.data.training_images import CachedSplit, open_cache
from ncsn.evaluation.extractors.base import Extractor, batches
from ncsn.evaluation.reference import Evaluator, extractor_of, open_evaluator
from ncsn.model import build
from ncsn.model.checkpoint import SamplingCheckpoint
from ncsn.model.generate import complete, evaluations_per_image, generate
from ncsn.report.images import inpainting_panel

Images = NDArray[np.uint8]

INPAINTED = 16  # test images
COMPLETIONS = 4  # of each
INPAINTING_STEPS = 10  # Langevin steps per level where inpainting does not extend the run's own sampler
SEED = 0  # of the order of test images, the same for all experiments on a dataset


@dataclass(frozen=True)
class FinishedRun:
    """Network, images and extractor of a finished run."""

    sampling: SamplingConfig
    trained: SamplingCheckpoint
    train: CachedSplit
    test: CachedSplit
    extractor: Extractor
    evaluator: Evaluator  # with the images to compare with
    real_split: str  # of real images that are measured for comparison
    samples: str  # URI
    device: str

    @property
    def sigmas(self) -> Tensor:
        """The levels that the sampler visits [L]."""
        return build.sampled_sigmas(self.trained.config, self.sampling)

    def test_images(self, count: int) -> Images:
        """At most `count` test images, the same in each call."""
        images: Images = self.test.images[self.test_rows(count)]
        return images

    def real_images(self, count: int) -> Images:
        """At most `count` real images that are not of the reference, the same in each call."""
        split = self.test if self.real_split == "test" else self.train
        images: Images = split.images[keyed_permutation(SEED, epoch=0, size=len(split))[:count]]
        return images

    def test_rows(self, count: int) -> NDArray[np.int64]:
        """The rows of `test_images` in the test split."""
        return keyed_permutation(SEED, epoch=0, size=len(self.test))[:count]


def open_run(config: Config, trained: SamplingCheckpoint, *, samples: str, dataset: str, device: str) -> FinishedRun:
    """Open a run from its checkpoint and the URIs of its samples and dataset."""
    return FinishedRun(
        sampling=config.sampling,
        trained=trained,
        train=open_cache(dataset, "train"),
        test=open_cache(dataset, "test"),
        evaluator=open_evaluator(config, dataset),  # trains the extractor first if it is missing
        extractor=extractor_of(config, dataset),
        real_split=config.evaluation.other_split,
        samples=samples,
        device=device,
    )


def inpainting(run: FinishedRun) -> tuple[Figure, dict[str, Any]]:
    """Completions of test images whose left half is given (Algorithm 2): a panel, and numbers for JSON."""
    originals = run.test_images(INPAINTED)
    height, width = originals.shape[1:3]
    known = np.broadcast_to(np.arange(width) < width // 2, (height, width)).copy()
    sampling = inpainting_chain(run.sampling, run.sigmas)
    labels = None
    if run.trained.config.data.num_classes is not None:
        labels = torch.from_numpy(run.test.labels[run.test_rows(INPAINTED)].repeat(COMPLETIONS))
    completions = complete(
        run.trained, originals.repeat(COMPLETIONS, axis=0), known, sampling=sampling, labels=labels, device=run.device
    ).reshape(len(originals), COMPLETIONS, *originals.shape[1:])
    unknown = completions[:, :, ~known] / 255.0
    error = unknown - originals[:, None, ~known] / 255.0
    return inpainting_panel(originals, completions, mask=known), {
        "sampler": sampling.sampler.model_dump(mode="json"),
        "given": "left half",
        "rmse": round(float(np.sqrt((error**2).mean())), 4),
        "spread_between_completions": round(float(unknown.std(axis=1).mean()), 4),
    }


def inpainting_chain(sampling: SamplingConfig, sigmas: Tensor) -> SamplingConfig:
    """The run's own sampling if its sampler is annealed Langevin dynamics, which inpainting extends; else with it."""
    chosen = build.sampler(sampling.sampler)
    if isinstance(chosen, AnnealedLangevin):
        return sampling
    if isinstance(chosen, Langevin) and len(sigmas) == 1:
        # At a single level, the annealed steps are the plain Langevin ones.
        sampler = AnnealedLangevin(epsilon=chosen.step_size, steps_per_level=chosen.num_steps)
    else:
        # Consistent steps keep the noise of each level, which the given pixels have.
        ratio = float((sigmas[0] / sigmas[-1]) ** (1 / (len(sigmas) - 1)))
        epsilon = consistent_epsilon(sigma_L=float(sigmas[-1]), ratio=ratio, steps_per_level=INPAINTING_STEPS)
        sampler = AnnealedLangevin(epsilon=epsilon, steps_per_level=INPAINTING_STEPS, consistent=True)
    return sampling.model_copy(update={"sampler": build.sampler_section(sampler)})


def quality(
    run: FinishedRun, *, nfe: Sequence[int], num_images: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """The run's sampler and the probability flow at several NFE, each measured over `num_images` new images.

    The plain values for JSON have in `real` the same metric of up to `num_images` real images of its `split`.
    """
    samplers, points = list(_samplers(run, nfe)), []
    for number, sampler in enumerate(samplers):
        section = build.sampler_section(sampler)
        sampling = run.sampling.model_copy(update={"sampler": section})
        started, images = time.perf_counter(), []
        for first in range(0, num_images, sampling.batch_size):
            count = min(sampling.batch_size, num_images - first)
            images.append(generate(run.trained, sampling=sampling, first=first, count=count, device=run.device))
            progress(number * num_images + first + count, len(samplers) * num_images)
        seconds = time.perf_counter() - started
        points.append(
            {
                "sampler": section.model_dump(mode="json"),
                "nfe": evaluations_per_image(run.trained.config.model_copy(update={"sampling": sampling})),
                "fid": _fid(run, np.concatenate(images)),
                "num_images": num_images,
                "seconds_per_1000_images": round(1000 * seconds / num_images, 2),
            }
        )
    real = run.real_images(num_images)
    return {
        "metric": f"{run.evaluator.name}_fid_n{num_images}",
        "fingerprint": run.evaluator.reference.fingerprint,
        "points": points,
        "real": {"fid": _fid(run, real), "num_images": len(real), "split": run.real_split},
        "cores": torch.get_num_threads(),
        "gpus": 0 if run.device == "cpu" else 1,
    }


def _samplers(run: FinishedRun, nfe: Sequence[int]) -> Iterator[Sampler]:
    """Both samplers at the nearest NFE that they can have, none twice; at a single level there is no flow."""
    num_levels, seen = len(run.sigmas), set()
    compared = (build.sampler(run.sampling.sampler), ProbabilityFlow())
    for sampler in compared if num_levels > 1 else compared[:1]:
        for wanted in sorted(set(nfe)):
            near = sampler.nearest(wanted, num_levels=num_levels)
            key = near.kind, near.num_evaluations(num_levels)
            if key not in seen:
                seen.add(key)
                yield near


def _fid(run: FinishedRun, images: Images) -> float:
    features = [run.extractor.extract(batch).features for batch in batches(images, batch_size=run.sampling.batch_size)]
    return run.evaluator.distance(np.concatenate(features))
