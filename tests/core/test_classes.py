"""Labels that training hides, and those of generated images."""

from __future__ import annotations

import math

import pytest
import torch

from ncsn.core.classes import balanced_labels, drawn_labels, drop_labels

LABELS = torch.arange(100_000) % 10


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_the_share_of_hidden_labels(probability: float) -> None:
    dropped = drop_labels(LABELS, probability=probability, seed=0, first=0)
    hidden = dropped == -1
    error = math.sqrt(probability * (1 - probability) / len(LABELS))
    assert abs(float(hidden.double().mean()) - probability) < 4 * error
    assert torch.equal(dropped[~hidden], LABELS[~hidden])
    of_class = hidden.view(-1, 10).double().mean(0)
    assert (of_class - probability).abs().max() < 5 * error * math.sqrt(10)


def test_the_same_labels_are_hidden_for_any_number_of_workers() -> None:
    whole = drop_labels(LABELS[:1000], probability=0.3, seed=4, first=0)
    parts = [drop_labels(LABELS[a:b], probability=0.3, seed=4, first=a) for a, b in ((0, 7), (7, 400), (400, 1000))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(drop_labels(LABELS[:1000], probability=0.3, seed=5, first=0), whole)
    assert torch.equal(drop_labels(LABELS, probability=0.0, seed=4, first=0), LABELS)
    assert (drop_labels(LABELS, probability=1.0, seed=4, first=0) == -1).all()


@pytest.mark.parametrize("count", [1, 9, 10, 511])
def test_balanced_labels_differ_in_number_by_one_at_most(count: int) -> None:
    labels = balanced_labels(10, first=0, count=count)
    counts = torch.bincount(labels, minlength=10)
    assert labels.dtype == torch.int64 and int(counts.max() - counts.min()) <= 1
    assert torch.equal(balanced_labels(10, first=3, count=5), torch.tensor([3, 4, 5, 6, 7]))


def test_drawn_labels_are_as_frequent_as_in_training() -> None:
    counts = [500, 0, 3000, 1500]
    labels = drawn_labels(counts, seed=0, first=0, count=100_000)
    shares = torch.bincount(labels, minlength=4).double() / len(labels)
    expected = torch.tensor(counts).double() / sum(counts)
    errors = (expected * (1 - expected) / len(labels)).sqrt()
    assert ((shares - expected).abs() <= 4 * errors).all() and shares[1] == 0
    parts = [drawn_labels(counts, seed=0, first=first, count=250) for first in range(0, 1000, 250)]
    assert torch.equal(torch.cat(parts), labels[:1000])
    assert not torch.equal(drawn_labels(counts, seed=1, first=0, count=1000), labels[:1000])
