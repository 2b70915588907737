"""Fidelity and diversity apart: precision, recall, density and coverage by nearest-neighbour balls.

Precision and recall after Kynkaanniemi et al. 2019, density and coverage after Naeem et al. 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ncsn.errors import UserError
from ncsn.evaluation.neighbours import distance_blocks, nearest_distances

Features = npt.NDArray[np.floating]


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares of images that lie in the other set's support.

    Attributes:
        precision: of the generated images, inside some real image's ball (k = 3), in [0, 1].
        recall: of the real images, inside some generated image's ball (k = 3), in [0, 1].
        density: real balls (k = 5) that a generated image lies in, on average, over k; above 1 where real is dense.
        coverage: of the real images, with a generated image inside their ball (k = 5), in [0, 1].
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(
    generated: Features,
    real: Features,
    *,
    neighbourhood: int = 3,
    density_neighbourhood: int = 5,
    block_size: int = 1024,
) -> PrecisionRecall:
    """Compare two sets of features; a ball reaches to its centre's k-th nearest neighbour in its own set.

    All four depend on the number of images: compare only figures of equal counts, and give both sets as many.

    Args:
        generated: [N, D].
        real: [M, D].
        neighbourhood: k of precision and recall.
        density_neighbourhood: k of density and coverage.
        block_size: rows of the distance matrix in memory at a time.

    Raises:
        ValueError: for different dimensions, or not more images than neighbours.
    """
    largest = max(neighbourhood, density_neighbourhood)
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise ValueError(f"features must be [N, D] and [M, D], got {list(generated.shape)} and {list(real.shape)}")
    if min(len(generated), len(real)) <= largest:
        raise UserError(
            "images",
            f"too few for balls of {largest} neighbors",
            hint=f"use at least {largest + 1}",
            value=min(len(generated), len(real)),
        )
    real_radii = nearest_distances(real, k=largest, block_size=block_size)
    generated_radii = nearest_distances(generated, k=neighbourhood, block_size=block_size)[:, neighbourhood - 1]
    small, large = real_radii[:, neighbourhood - 1], real_radii[:, density_neighbourhood - 1]
    inside, hits = 0, 0
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, distances in distance_blocks(generated, real, block_size=block_size):
        inside += int((distances <= small).any(axis=1).sum())
        hits += int((distances < large).sum())
        recalled |= (distances <= generated_radii[rows, None]).any(axis=0)
        covered |= (distances < large).any(axis=0)
    return PrecisionRecall(
        precision=inside / len(generated),
        recall=float(recalled.mean()),
        density=hits / (density_neighbourhood * len(generated)),
        coverage=float(covered.mean()),
    )
