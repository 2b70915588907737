"""Inception score, kernel distance, precision and recall."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ncsn.errors import UserError
from ncsn.evaluation.frechet import jackknife_deviation, jackknife_groups

Array = npt.NDArray[np.float64]
Features = npt.NDArray[np.floating]

BLOCK_VALUES, KERNEL_ROWS = 1 << 23, 1024


def _rows(vectors: Features) -> Array:
    return np.asarray(vectors, dtype=np.float64).reshape(len(vectors), -1)


def _distances(a: Array, b: Array) -> Array:
    """[N, M] by |a|^2 + |b|^2 - 2 a.b: exact for pixel values, which are small whole numbers in float64."""
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * (a @ b.T)
    distances: Array = np.sqrt(np.maximum(squares, 0.0))
    return distances


def inception_score(log_probabilities: npt.ArrayLike, *, num_splits: int = 10) -> tuple[float, float]:
    """The exponential of the mean KL divergence between p(y|x) and p(y), the mean of p(y|x) within a split; in [1, K].

    The result is an *Inception score* only for the logits of the 2015 Inception graph without its last bias; with any
    other classifier it is that classifier's score.

    Args:
        log_probabilities: [N, K] log p(y|x), each row summing to 1 after exp; -inf for a probability of 0 is fine.
        num_splits: contiguous splits of the N rows, equal to within one row; order matters.

    Returns:
        Mean and population standard deviation over the splits.
    """
    log_p = np.asarray(log_probabilities, dtype=np.float64)
    count, scores = len(log_p), []
    if count < num_splits:
        reason, hint = f"does not fill {num_splits} splits", "generate more images, or lower evaluation.num_splits"
        raise UserError("sampling.num_images", reason, hint=hint, value=count)
    for split in range(num_splits):
        rows = log_p[split * count // num_splits : (split + 1) * count // num_splits]
        p = np.exp(rows)
        marginal = p.mean(axis=0)
        # E KL(p(y|x) || p(y)) = H(y) - H(y|x); each entropy has 0 log 0 = 0.
        conditional = -np.sum(p * np.where(p > 0, rows, 0.0), axis=1).mean()
        entropy = -np.sum(marginal * np.log(np.where(marginal > 0, marginal, 1.0)))
        scores.append(float(np.clip(np.exp(entropy - conditional), 1.0, rows.shape[1])))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(a: Features, b: Features, **how: int) -> tuple[float, float]:
    """The mean of `kernel_distances`, and its standard deviation over other `a` of this size, by the jackknife.

    Where the distance is zero, the latter is up to sqrt(2) too large.
    """
    value, without_group = kernel_distances(a, b, **how)
    return value, jackknife_deviation(without_group)


def kernel_distances(
    a: Features,
    b: Features,
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    classes_in_turn: int = 1,
) -> tuple[float, Array]:
    """Mean squared MMD over random subsets, with the kernel k(x, y) = (x.y / D + 1)^3 (Binkowski et al. 2018).

    Being unbiased, it may be negative. N and M are at least 2.

    Args:
        a: [N, D] features.
        b: [M, D] features, which count as known.
        num_subsets: Pairs of subsets, each drawn without replacement.
        subset_size: Feature vectors per subset; fewer if N or M is smaller.
        classes_in_turn: Vector i of `a` has class i mod this number.

    Returns:
        The mean over the subsets, and its values without each group of `a` [K].
    """
    size = min(subset_size, len(a), len(b))
    generator = np.random.Generator(np.random.Philox(seed))
    # Subsets that are all of both sets do not differ: one is enough.
    repeats = 1 if size == len(a) == len(b) else num_subsets
    groups, everything = _members(a, classes_in_turn), np.ones((1, size))
    estimates, without_group = [], []
    for _ in range(repeats):
        # Sorted, because a memory map is read faster in order and the estimate does not depend on the order.
        rows, columns = (np.sort(generator.choice(len(each), size, replace=False)) for each in (a, b))
        x, y = (np.asarray(each, dtype=np.float64) for each in (a[rows], b[columns]))
        same_y = _pair_sums(y, y, everything, everything).sum() / (size * (size - 1))
        estimate, rest, _ = _distances_without(x, y, groups[:, rows], everything)
        estimates.append(float(estimate + same_y))
        without_group.append(rest + same_y)
    return float(np.mean(estimates)), np.mean(without_group, axis=0)


def excess_distance(x: Features, y: Features, reference: Features, *, classes_in_turn: int = 1) -> tuple[float, float]:
    """Kernel distance of x [n, D] less that of y [m, D], both to the reference [N, D].

    It is of all vectors and unbiased, so n and m, at least 3, may differ. `classes_in_turn` is of x.

    Returns:
        The difference, and its standard deviation over other x, y and references: the variance is the sum of three
        delete-a-group jackknives (see `jackknife_deviation`). That over the reference is of the difference itself, in
        which most of it cancels.
    """
    known = _members(reference, 1)
    ours = _distances_without(x, reference, _members(x, classes_in_turn), known)
    theirs = _distances_without(y, reference, _members(y, 1), known)
    variance = sum((len(each) - 1) * each.var() for each in (ours[1], theirs[1], ours[2] - theirs[2]))
    return float(ours[0] - theirs[0]), float(np.sqrt(variance))


def _distances_without(x: Features, y: Features, groups_x: Array, groups_y: Array) -> tuple[float, Array, Array]:
    """What depends on x of its kernel distance to y: of all, without each group of x [K], and without each of y [L]."""
    pairs, across = _pair_sums(x, x, groups_x, groups_x), _pair_sums(x, y, groups_x, groups_y)
    left, left_y = (own.shape[1] - own.sum(axis=1) for own in (groups_x, groups_y))
    within = pairs.sum() / (len(x) * (len(x) - 1))
    whole = within - 2 * across.sum() / (len(x) * len(y))
    # A small subset may lie in one group; then it says nothing about the others.
    known, left, left_y = left >= 2, np.maximum(left, 2), np.maximum(left_y, 1)
    rest = (pairs.sum() - 2 * pairs.sum(axis=1) + pairs.diagonal()) / (left * (left - 1))
    without_x = rest - 2 * (across.sum() - across.sum(axis=1)) / (left * len(y))
    without_y = within - 2 * (across.sum() - across.sum(axis=0)) / (len(x) * left_y)
    return whole, np.where(known, without_x, whole), without_y


def _members(vectors: Features, classes_in_turn: int) -> Array:
    """Which of K groups of the jackknife a vector is in, 0 or 1 [K, N]."""
    numbers = jackknife_groups(0, len(vectors), classes_in_turn=classes_in_turn)
    return np.equal(numbers, np.unique(numbers)[:, None]).astype(np.float64)


def _pair_sums(a: Features, b: Features, groups_a: Array, groups_b: Array) -> Array:
    """Sums [K, L] of the kernel over the pairs of a group of a and one of b; where a is b, of different vectors."""
    sums = np.zeros((len(groups_a), len(groups_b)))
    columns = BLOCK_VALUES // max(KERNEL_ROWS, b.shape[1])
    for left in range(0, len(b), columns):
        y = np.asarray(b[left : left + columns], np.float64)
        for top in range(0, len(a), KERNEL_ROWS):
            base = np.asarray(a[top : top + KERNEL_ROWS], np.float64) @ y.T
            base /= y.shape[1]
            base += 1
            kernel = base * base * base  # a power of floats is many times slower
            if a is b:
                same = np.arange(max(top, left), min(top + len(kernel), left + len(y)))
                kernel[same - top, same - left] = 0
            sums += groups_a[:, top : top + KERNEL_ROWS] @ kernel @ groups_b[:, left : left + columns].T
    return sums


def precision_recall(
    generated: Features, real: Features, *, neighborhood: int = 3, density_neighborhood: int = 5, block_size: int = 1024
) -> dict[str, float]:
    """Shares of images in the other set's support (Kynkaanniemi et al. 2019, Naeem et al. 2020).

    A ball reaches to its center's k-th nearest neighbor in the same set.

    - `precision`: of the generated images, inside some real image's ball (k = 3).
    - `recall`: of the real images, inside some generated image's ball (k = 3).
    - `density`: real balls (k = 5) around a generated image, on average, over k; above 1 where real is dense.
    - `coverage`: of the real images, with a generated image inside their ball (k = 5).

    All four depend on the number of images: compare only values of equal counts, and give both sets as many, [N, D] and
    [M, D], more than the largest k. `neighborhood` is the k of precision and recall, `density_neighborhood` that of
    density and coverage.
    """
    rows, columns = _rows(generated), _rows(real)

    def radii(own: Array, *neighbors: int) -> Array:
        parts = (own[first : first + block_size] for first in range(0, len(own), block_size))
        # The nearest vector of the own set is the vector itself.
        found = [np.partition(_distances(part, own), neighbors, axis=1)[:, neighbors] for part in parts]
        return np.concatenate(found).T

    small, large = radii(columns, neighborhood, density_neighborhood)
    (generated_radii,) = radii(rows, neighborhood)
    inside, hits = 0, 0
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for first in range(0, len(generated), block_size):
        own = slice(first, first + block_size)
        distances = _distances(rows[own], columns)
        inside += int((distances <= small).any(axis=1).sum())
        hits += int((distances < large).sum())
        recalled |= (distances <= generated_radii[own, None]).any(axis=0)
        covered |= (distances < large).any(axis=0)
    return {
        "precision": inside / len(generated),
        "recall": float(recalled.mean()),
        "density": hits / (density_neighborhood * len(generated)),
        "coverage": float(covered.mean()),
    }
