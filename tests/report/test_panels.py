from __future__ import annotations

import numpy as np
import pytest

from ncsn.report.images import MAX_STAGES, inpainting_panel, interpolation_panel, neighbours_panel, samples_at_levels
from ncsn.report.style import to_png


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def shown(figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for image in figure.axes[0].get_images()]


def words(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts if text.get_text()]


def test_levels_are_columns_and_images_rows() -> None:
    frames = images(4, 2, 8, 8, 1)
    figure = samples_at_levels(frames, sigmas=[1.0, 0.1, 0.01])
    assert words(figure) == ["start", "1", "0.1", "0.01"]
    np.testing.assert_array_equal(shown(figure), frames.swapaxes(0, 1).swapaxes(0, 1).reshape(8, 8, 8))


def test_of_many_levels_the_first_and_the_last_are_shown() -> None:
    figure = samples_at_levels(images(233, 1, 4, 4, 3), sigmas=np.geomspace(50, 0.01, 232).tolist())
    assert len(words(figure)) == MAX_STAGES
    assert (words(figure)[0], words(figure)[-1]) == ("start", "0.01")


def test_sigmas_must_fit_the_stages() -> None:
    with pytest.raises(ValueError, match="sigma"):
        samples_at_levels(images(4, 2, 8, 8, 1), sigmas=[1.0, 0.1])


def test_neighbours_stand_beside_their_sample_with_their_distances() -> None:
    samples, neighbours = images(2, 8, 8, 1), images(2, 2, 8, 8, 1)
    distances = np.array([[1.5, 1064.2], [3.25, 40.0]])
    figure = neighbours_panel(samples, neighbours, distances=distances, memorised=[False, True])
    assert [word for word in words(figure) if word in ("sample", "nearest", "2")] == ["sample", "nearest", "2"]
    assert {"1.5", "1064", "3.25", "40"} <= set(words(figure))
    assert words(figure).count("copy") == 1
    columns = [samples, neighbours[:, 0], neighbours[:, 1]]
    np.testing.assert_array_equal(shown(figure), np.concatenate(columns)[..., 0])


def test_the_part_that_was_not_given_is_grey() -> None:
    originals, completions = images(2, 4, 4, 3), images(2, 3, 4, 4, 3)
    mask = np.zeros((4, 4), bool)
    mask[:, :2] = True
    figure = inpainting_panel(originals, completions, mask=mask)
    assert words(figure) == ["original", "given", "1", "2", "3"]
    given = shown(figure)[2]
    np.testing.assert_array_equal(given[:, :2], originals[0][:, :2])
    assert (given[:, 2:] == 128).all()
    assert to_png(figure)


def test_interpolations_are_rows_between_their_ends() -> None:
    rows = images(2, 5, 4, 4, 3)
    figure = interpolation_panel(rows)
    assert words(figure) == ["one", "0.25", "0.50", "0.75", "other"]
    np.testing.assert_array_equal(shown(figure), rows.swapaxes(0, 1).reshape(10, 4, 4, 3))
