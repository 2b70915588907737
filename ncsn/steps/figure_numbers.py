"""What the figures of a run show, computed: images at each level, completions, neighbours, and quality over NFE."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncsn.config import Config
from ncsn.config.schema import SamplingConfig
from ncsn.core.keyed_random import keyed_permutation
from ncsn.core.noise_schedule import consistent_epsilon
from ncsn.core.ode_samplers import ProbabilityFlow
from ncsn.core.samplers import AnnealedLangevin, Langevin, Sampler
from ncsn.data.shards import read_samples
from ncsn.data.training_images import CachedSplit, open_cache
from ncsn.evaluation.extractors import Extractor, batches
from ncsn.evaluation.frechet import FrechetStatistics, frechet_distance
from ncsn.evaluation.reference import Reference, extractor_of, open_evaluator
from ncsn.evaluation.scores import nearest_neighbours
from ncsn.model import build
from ncsn.model import checkpoint as checkpoints
from ncsn.model.checkpoint import SamplingCheckpoint
from ncsn.model.generate import complete, generate, interpolate, level_images
from ncsn.report.images import Stages

Images = NDArray[np.uint8]
Space = Literal["pixels", "features"]

ROWS = 8
"""Images of a panel."""
INPAINTED = 16
"""Test images that are completed."""
COMPLETIONS = 4
NEIGHBOURS = 5
INTERPOLATIONS = 4
INTERPOLATED = 8
"""Images of each interpolation, both ends included."""
INPAINTING_STEPS = 10
"""Langevin steps per level where the run's sampler is not the one that inpainting extends."""
SEED = 0
"""Of the order in which test images are taken: the same for all experiments on a data set."""


@dataclass(frozen=True)
class Subject:
    """A finished run, opened.

    Attributes:
        sampling: Sampler and seed.
        trained: Network with the EMA weights.
        train: The training images.
        test: The test images.
        extractor: What the run is evaluated with.
        reference: The training images through it.
        samples: URI of the run's samples.
        device: Where to compute.
    """

    sampling: SamplingConfig
    trained: SamplingCheckpoint
    train: CachedSplit
    test: CachedSplit
    extractor: Extractor
    reference: Reference
    samples: str
    device: str

    @property
    def sigmas(self) -> Tensor:
        """The network's levels [L]."""
        return build.sigmas(self.trained.config)

    def test_images(self, count: int) -> Images:
        """At most `count` test images, the same in each call."""
        rows = keyed_permutation(SEED, epoch=0, size=len(self.test))[:count]
        images: Images = self.test.images[rows]
        return images


@dataclass(frozen=True)
class Levels:
    """Images `[stages, N, H, W, C]` on their way: after which stage, 0 = the start, and at which sigma."""

    frames: Images
    stages: list[int]
    sigmas: list[float]


@dataclass(frozen=True)
class Inpainted:
    """Test images [N, H, W, C], the pixels that were given [H, W], and completions [N, k, H, W, C]."""

    originals: Images
    known: NDArray[np.bool_]
    completions: Images
    facts: dict[str, Any]


@dataclass(frozen=True)
class NearestImages:
    """Samples [N, H, W, C], their nearest training images [N, k, H, W, C] and distances [N, k]."""

    samples: Images
    neighbours: Images
    distances: NDArray[np.float64]
    memorised: list[bool]
    facts: dict[str, Any]


@dataclass(frozen=True)
class QualityPoint:
    """One sampler at one length of its chain."""

    sampler: Sampler
    nfe: int
    fid: float
    num_images: int
    seconds_per_1000: float

    @property
    def facts(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "sampler": build.sampler_section(self.sampler).model_dump(mode="json"),
            "nfe": self.nfe,
            "fid": self.fid,
            "num_images": self.num_images,
            "seconds_per_1000_images": self.seconds_per_1000,
        }


def levels(subject: Subject, *, most: int) -> Levels:
    """The run's first samples as they stand after at most `most` of the levels."""
    stages = Stages(most + 1)
    final = generate(
        subject.trained,
        sampling=subject.sampling,
        first=0,
        count=ROWS,
        device=subject.device,
        on_level=lambda stage, x: stages.add(stage, level_images(x, subject.sampling)),
    )
    stages.add(stages.numbers[-1], final)
    sigmas = build.sampler(subject.sampling.sampler).visited(subject.sigmas)
    return Levels(stages.frames, stages.numbers, [sigmas[stage - 1] for stage in stages.numbers if stage > 0])


def inpainting(subject: Subject) -> Inpainted:
    """Completions of test images whose left half is given (Algorithm 2)."""
    originals = subject.test_images(INPAINTED)
    height, width = originals.shape[1:3]
    known = np.broadcast_to(np.arange(width) < width // 2, (height, width)).copy()
    sampling = inpainting_chain(subject.sampling, subject.sigmas)
    completions = complete(
        subject.trained, originals.repeat(COMPLETIONS, axis=0), known, sampling=sampling, device=subject.device
    ).reshape(len(originals), COMPLETIONS, *originals.shape[1:])
    unknown = completions[:, :, ~known] / 255.0
    error = unknown - originals[:, None, ~known] / 255.0
    facts = {
        "sampler": sampling.sampler.model_dump(mode="json"),
        "given": "left half",
        "rmse": round(float(np.sqrt((error**2).mean())), 4),
        "spread_between_completions": round(float(unknown.std(axis=1).mean()), 4),
    }
    return Inpainted(originals, known, completions, facts)


def inpainting_chain(sampling: SamplingConfig, sigmas: Tensor) -> SamplingConfig:
    """The sampling itself where inpainting extends its sampler; else with annealed Langevin dynamics.

    Its steps keep each level's noise, as what is given has it; at a single level they are the plain Langevin ones.
    """
    chosen = build.sampler(sampling.sampler)
    if isinstance(chosen, AnnealedLangevin):
        return sampling
    if isinstance(chosen, Langevin) and len(sigmas) == 1:
        sampler = AnnealedLangevin(epsilon=chosen.step_size, steps_per_level=chosen.num_steps)
    else:
        ratio = float((sigmas[0] / sigmas[-1]) ** (1 / (len(sigmas) - 1)))
        epsilon = consistent_epsilon(sigma_L=float(sigmas[-1]), ratio=ratio, steps_per_level=INPAINTING_STEPS)
        sampler = AnnealedLangevin(epsilon=epsilon, steps_per_level=INPAINTING_STEPS, consistent=True)
    return sampling.model_copy(update={"sampler": build.sampler_section(sampler)})


def interpolations(subject: Subject) -> Images:
    """From each even one of the run's first images to the odd one after it, [pairs, images, H, W, C]."""
    return np.stack(
        [
            interpolate(
                subject.trained,
                sampling=subject.sampling,
                first=2 * pair,
                second=2 * pair + 1,
                count=INTERPOLATED,
                device=subject.device,
            )
            for pair in range(INTERPOLATIONS)
        ]
    )


def neighbours(subject: Subject, *, space: Space) -> NearestImages:
    """The training images nearest to the run's first samples, by pixels or by what the extractor sees."""
    samples = np.concatenate(list(read_samples(subject.samples, num_images=ROWS, batch_size=ROWS)))
    if space == "pixels":
        found = nearest_neighbours(samples, subject.train.images, k=NEIGHBOURS)
    else:
        found = nearest_neighbours(
            subject.extractor.extract(samples).features, subject.reference.features, k=NEIGHBOURS
        )
    rows = [
        {
            "image": image,
            "rows": indices.tolist(),
            "distances": np.round(distances, 4).tolist(),
            "memorised": bool(copy),
        }
        for image, (indices, distances, copy) in enumerate(
            zip(found.indices, found.distances, found.memorised, strict=True)
        )
    ]
    return NearestImages(
        samples=samples,
        neighbours=subject.train.images[found.indices],
        distances=found.distances,
        memorised=found.memorised.tolist(),
        facts={"unit": "grey levels, 0 to 255" if space == "pixels" else "features", "samples": rows},
    )


def quality(
    subject: Subject, *, nfe: Sequence[int], num_images: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """The run's sampler and the probability flow at several lengths, each measured over `num_images` new images.

    Returns:
        Plain values for JSON: `metric`, `fingerprint`, `points`, `real` (the same figure of as many real test images
        as there are, up to `num_images`), and the `cores` and `gpus` that were busy meanwhile.
    """
    points = _points(subject, nfe=nfe, num_images=num_images, progress=progress)
    real = subject.test_images(num_images)
    return {
        "metric": f"{subject.extractor.name}_fid_n{num_images}",
        "fingerprint": subject.reference.fingerprint,
        "points": [point.facts for point in points],
        "real": {"fid": _fid(subject, real), "num_images": len(real)},
        "cores": torch.get_num_threads(),
        "gpus": 0 if subject.device == "cpu" else 1,
    }


def _points(
    subject: Subject, *, nfe: Sequence[int], num_images: int, progress: Callable[[int, int], None]
) -> list[QualityPoint]:
    chosen = list(_samplers(subject, nfe))
    points = []
    for number, sampler in enumerate(chosen):
        sampling = subject.sampling.model_copy(update={"sampler": build.sampler_section(sampler)})
        done = number * num_images
        started = time.perf_counter()
        images = []
        for first in range(0, num_images, sampling.batch_size):
            count = min(sampling.batch_size, num_images - first)
            images.append(generate(subject.trained, sampling=sampling, first=first, count=count, device=subject.device))
            progress(done + first + count, len(chosen) * num_images)
        seconds = time.perf_counter() - started
        points.append(
            QualityPoint(
                sampler=sampler,
                nfe=sampler.num_evaluations(len(subject.sigmas)),
                fid=_fid(subject, np.concatenate(images)),
                num_images=num_images,
                seconds_per_1000=round(1000 * seconds / num_images, 2),
            )
        )
    return points


def _samplers(subject: Subject, nfe: Sequence[int]) -> Iterator[Sampler]:
    """The run's sampler and, between several levels, the probability flow, of the nearest lengths and none twice."""
    num_levels, seen = len(subject.sigmas), set()
    compared = (build.sampler(subject.sampling.sampler), ProbabilityFlow())
    for sampler in compared if num_levels > 1 else compared[:1]:
        for wanted in sorted(set(nfe)):
            near = sampler.nearest(wanted, num_levels=num_levels)
            key = near.kind, near.num_evaluations(num_levels)
            if key not in seen:
                seen.add(key)
                yield near


def _fid(subject: Subject, images: Images) -> float:
    features = [
        subject.extractor.extract(batch).features for batch in batches(images, batch_size=subject.sampling.batch_size)
    ]
    return frechet_distance(FrechetStatistics.of(np.concatenate(features)), subject.reference.statistics)


def subject_of(
    config: Config, trained: checkpoints.SamplingCheckpoint, *, samples: str, dataset: str, device: str
) -> Subject:
    """Open a finished run, of which `samples` and `dataset` are URIs."""
    evaluator = open_evaluator(config, dataset)
    return Subject(
        sampling=config.sampling,
        trained=trained,
        train=open_cache(dataset, "train"),
        test=open_cache(dataset, "test"),
        extractor=extractor_of(config, dataset),
        reference=evaluator.reference,
        samples=samples,
        device=device,
    )
