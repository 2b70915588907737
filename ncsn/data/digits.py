"""scikit-learn's 1,797 real handwritten digits of 8x8 pixels, which come with the package."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ncsn.config.schema import DataConfig
from ncsn.data.source import Example, Source, Split, fit_of, held_out

_LARGEST_INK = 16


def open_digits(data: DataConfig) -> Source:
    """The digits, their ink 0..16 spread over 0..255, with a share held out for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.floor(digits.images * (255 / _LARGEST_INK) + 0.5).astype(np.uint8)[..., None]
    labels = digits.target.astype(int).tolist()
    test = held_out([f"digit {index}" for index in range(len(labels))], labels, data.test_fraction)
    fit = fit_of(data)

    def split(indices: np.ndarray) -> Split:
        def stream() -> Iterator[Example]:
            for index in indices:
                yield Example(fit.array(images[index], name=f"digit {index}"), labels[index])

        return Split(len(indices), stream)

    return Source(
        description="Optical Recognition of Handwritten Digits (test part), E. Alpaydin and C. Kaynak 1998, 8x8 gray",
        license="CC BY 4.0 (UCI Machine Learning Repository); shipped with scikit-learn",
        class_names=tuple(str(name) for name in digits.target_names),
        splits={"train": split(np.flatnonzero(~test)), "test": split(np.flatnonzero(test))},
    )
