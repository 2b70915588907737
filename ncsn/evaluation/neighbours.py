"""Nearest neighbours among the training images, in pixels or features, and what they say about memorisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.number]

BLOCK_VALUES = 1 << 23
MEMORISED_RATIO = 1 / 3
"""A copy is this much nearer to its nearest training image than to the second nearest (Yoon et al. 2023)."""


@dataclass(frozen=True)
class Neighbours:
    """The k nearest reference vectors of each of Q queries, nearest first.

    Attributes:
        indices: [Q, k] int64 rows of the reference.
        distances: [Q, k] float64 Euclidean distances.
    """

    indices: npt.NDArray[np.int64]
    distances: Array

    @property
    def memorised(self) -> npt.NDArray[np.bool_]:
        """[Q] whether a query is a copy: under a third as far from its nearest neighbour as from its second.

        A training image that stands in the data set twice is not recognised: then both distances are small.
        """
        flags: npt.NDArray[np.bool_] = self.distances[:, 0] < MEMORISED_RATIO * self.distances[:, 1]
        return flags


def nearest_neighbours(
    queries: Vectors, reference: Vectors, *, k: int = 2, block_size: int | None = None
) -> Neighbours:
    """Exact k nearest neighbours by Euclidean distance, in one pass over the reference.

    Args:
        queries: [Q, ...] vectors or images; images count as the vectors of their values.
        reference: [N, ...] with N >= k; a memory map is read one block at a time.
        k: neighbours per query, at least 2 for the memorisation flag.
        block_size: reference vectors in memory at a time; None = about 64 MB of them.

    Raises:
        ValueError: for different shapes, or fewer reference vectors than k.
    """
    if queries.shape[1:] != reference.shape[1:]:
        raise ValueError(f"queries of shape {list(queries.shape[1:])} have no distance to {list(reference.shape[1:])}")
    if not 2 <= k <= len(reference):
        raise ValueError(f"k = {k} neighbours among {len(reference)}; use 2 to {len(reference)}")
    flat = _rows(queries)
    block_size = block_size or max(BLOCK_VALUES // flat.shape[1], 1)
    distances, indices = np.full((len(flat), k), np.inf), np.zeros((len(flat), k), np.int64)
    for first in range(0, len(reference), block_size):
        block = _rows(reference[first : first + block_size])
        candidates = np.concatenate([distances, _distances(flat, block)], axis=1)
        numbers = np.broadcast_to(np.arange(first, first + len(block)), (len(flat), len(block)))
        keep = np.argpartition(candidates, k - 1, axis=1)[:, :k]
        indices = np.take_along_axis(np.concatenate([indices, numbers], axis=1), keep, axis=1)
        distances = np.take_along_axis(candidates, keep, axis=1)
    order = np.lexsort((indices, distances), axis=1)
    return Neighbours(
        indices=np.take_along_axis(indices, order, axis=1), distances=np.take_along_axis(distances, order, axis=1)
    )


def nearest_distances(vectors: Vectors, *, k: int, block_size: int = 1024) -> Array:
    """[N, k] ascending distances of each of N > k vectors to its nearest others, itself left out."""
    nearest = np.empty((len(vectors), k))
    for rows, distances in distance_blocks(vectors, vectors, block_size=block_size):
        distances[np.arange(len(rows)), rows] = np.inf
        nearest[rows] = np.sort(np.partition(distances, k - 1, axis=1)[:, :k], axis=1)
    return nearest


def distance_blocks(a: Vectors, b: Vectors, *, block_size: int) -> Iterator[tuple[npt.NDArray[np.int64], Array]]:
    """The [N, M] Euclidean distance matrix in blocks of rows: (row numbers, distances)."""
    columns = _rows(b)
    for first in range(0, len(a), block_size):
        rows = _rows(a[first : first + block_size])
        yield np.arange(first, first + len(rows)), _distances(rows, columns)


def _rows(vectors: Vectors) -> Array:
    return np.asarray(vectors, dtype=np.float64).reshape(len(vectors), -1)


def _distances(a: Array, b: Array) -> Array:
    """[N, M] by |a|^2 + |b|^2 - 2 a.b: exact for pixel values, which are small whole numbers in float64."""
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * (a @ b.T)
    distances: Array = np.sqrt(np.maximum(squares, 0.0))
    return distances
