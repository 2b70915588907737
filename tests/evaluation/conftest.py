import numpy as np
import pytest
from sklearn.datasets import load_digits

from ncsn.data.format import Rows


@pytest.fixture(scope="session")
def digits() -> tuple[Rows, Rows]:
    """The 1,797 real 8x8 digits as (train, test) splits of 1,257 and 540 images."""
    data = load_digits()
    images = np.floor(data.images / 16 * 255 + 0.5).astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(len(images))
    labels = data.target.astype(np.int64)
    train, test = order[540:], order[:540]
    return Rows(images[train], labels[train]), Rows(images[test], labels[test])
