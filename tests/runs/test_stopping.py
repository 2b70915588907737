"""When a training stops, from its measurements alone."""

from __future__ import annotations

import pytest

from ncsn.config.training import StopConfig
from ncsn.runs.curves import plateau

SEEN = [10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize(
    ("values", "patience", "tolerance", "stops", "best_at"),
    [
        ([6, 5, 4, 3, 2, 1], 10, 0.0, None, None),
        ([3, 2, 2, 1, 1, 1], 20, 0.0, 60, 40),
        ([3, 2, 2, 2, 1, 1], 20, 0.0, 40, 20),
        ([1, 2, 3, 4, 5, 6], 50, 0.0, 60, 10),
        ([1, 2, 3, 4, 5, 6], 51, 0.0, None, None),
        # Falls of one percent do not count, but their sum does.
        ([100, 99, 98.01, 97.03, 96.06, 95.1], 20, 0.015, None, None),
        ([100, 99, 98.6, 98, 97.6, 97], 20, 0.015, 30, 10),
    ],
)
def test_it_stops_where_nothing_has_fallen_for_long_enough(
    values: list[float], patience: int, tolerance: float, stops: int | None, best_at: int | None
) -> None:
    found = plateau(
        SEEN, values, metric="val/loss", stop=StopConfig(by="fid", patience_images=patience, tolerance=tolerance)
    )
    assert (found and found.images_seen, found and found.best_at) == (stops, best_at)
    for later in range(1, len(SEEN)):  # the same while it goes on, and after a resume
        cut = plateau(
            SEEN[:later],
            values[:later],
            metric="val/loss",
            stop=StopConfig(by="fid", patience_images=patience, tolerance=tolerance),
        )
        assert cut == (found if stops is not None and SEEN[later - 1] >= stops else None)


def test_the_reason_has_the_numbers() -> None:
    text = str(plateau(SEEN, [1.5] * 6, metric="val/fid", stop=StopConfig(by="fid", patience_images=30)))
    assert "val/fid" in text and "1.5" in text and "40" in text and "30" in text
