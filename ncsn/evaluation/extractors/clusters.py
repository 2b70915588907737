"""Clusters of similar images, which take the place of labels where there are none."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ncsn.evaluation.extractors.base import Images, batches

NUM_CLUSTERS = 16
IMAGES_PER_CLUSTER = 8  # on average, at least; fewer images have fewer clusters
LARGEST_SIDE = 32  # pixels; larger images are averaged down first
_COMPONENTS = 32
_FITTED_IMAGES = 10_000
_BATCH_VALUES = 1 << 22  # pixel values that are converted at once


def num_clusters(num_images: int) -> int:
    """The number of clusters for `num_images` images, at least 2."""
    return max(2, min(NUM_CLUSTERS, num_images // IMAGES_PER_CLUSTER))


def cluster_labels(images: Images, *, count: int, seed: int) -> npt.NDArray[np.int64]:
    """The cluster of each image, [N], by k-means on the principal components of the pixels.

    Components and centers are those of at most 10,000 images [N, H, W, C] uint8, which the seed chooses, as it does the
    first centers. Some clusters are empty if fewer images differ.
    """
    # Here, since few runs have clusters, and every process on Ray would load a second longer.
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning

    generator = np.random.default_rng(seed)
    fitted = np.sort(generator.permutation(len(images))[:_FITTED_IMAGES])
    size = max(1, _BATCH_VALUES // images[0].size)
    pixels = np.concatenate([_pixels(images[fitted[first : first + size]]) for first in range(0, len(fitted), size)])
    with warnings.catch_warnings():
        # Fewer images differ than there are clusters, or none do.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        reduce = PCA(min(_COMPONENTS, *pixels.shape), random_state=seed).fit(pixels)
        centers = KMeans(min(count, len(fitted)), n_init=3, random_state=seed).fit(reduce.transform(pixels))
    found = [centers.predict(reduce.transform(_pixels(batch))) for batch in batches(images, batch_size=size)]
    return np.concatenate(found).astype(np.int64)


def _pixels(images: Images) -> npt.NDArray[np.float32]:
    """[n, D] pixels in [0, 1] of images that are averaged down by a whole factor."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
    factor = -(-max(images.shape[1:3]) // LARGEST_SIDE)
    reduced: npt.NDArray[np.float32] = F.avg_pool2d(pixels, factor).flatten(1).numpy()
    return reduced
