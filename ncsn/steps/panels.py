"""The panels of a report for which images have to be made: what more evaluations buy, and inpainting.

`ncsn figures` makes them for any model, and where it has, its numbers are taken. For a model so small that it takes
seconds, such as the demo's, the report makes them itself, over fewer images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ncsn import storage
from ncsn.config import Config
from ncsn.model.checkpoint import SamplingCheckpoint
from ncsn.model.generate import evaluations_per_image
from ncsn.report.diagnostics import quality_panel
from ncsn.report.images import inpainting_panel
from ncsn.report.page import Figures, Picture
from ncsn.report.style import to_png
from ncsn.runs.costs import Prices
from ncsn.steps import figure_numbers as numbers
from ncsn.steps.figures import subject_of

SMALL_WORK = 1e12
"""Evaluations x parameters x pixels of all panels together: some five seconds on two cores."""
FIGURES = "figures.json"
"""Where `ncsn figures` leaves its numbers, in the folder of the report."""
QUICK_NFE = (10, 40)
QUICK_IMAGES = 64
COMPLETED = numbers.ROWS * numbers.COMPLETIONS


def sampled_panels(
    config: Config,
    trained: SamplingCheckpoint,
    *,
    folder: str,
    samples: str,
    dataset: str,
    prices: Prices,
    progress: Callable[[int, int], None],
) -> Iterator[Figures]:
    """The panels that there are, or that take seconds.

    Args:
        config: The experiment.
        trained: Its network.
        folder: Where `ncsn figures` leaves its numbers.
        samples: URI of the samples.
        dataset: URI of the data set.
        prices: What the images cost.
        progress: Called with (images done, images in all).
    """
    stored = storage.join(folder, FIGURES)
    if storage.exists(stored):
        drawn = storage.read_json(stored)
        yield quality_panel(drawn["quality"], prices)
        yield _inpainting(storage.read_bytes(storage.join(folder, "inpainting.png")))
    elif quick_work(config, trained) <= SMALL_WORK:
        subject = subject_of(config, trained, samples=samples, dataset=dataset, device="cpu")
        try:
            measured = numbers.quality(subject, nfe=QUICK_NFE, num_images=QUICK_IMAGES, progress=progress)
            made = numbers.inpainting(subject)
        except ValueError as error:  # a short chain may leave the finite numbers where the run's own does not
            yield Figures("Quality against cost", "", hints=[f"Not drawn: {error}."])
            return
        yield quality_panel(measured, prices)
        yield _inpainting(to_png(inpainting_panel(made.originals, made.completions, mask=made.known)))


def quick_work(config: Config, trained: SamplingCheckpoint) -> float:
    """How much it is to make both panels, in evaluations x parameters x pixels."""
    num_levels = config.levels.num_levels
    chains = 2 * sum(max(nfe, num_levels) for nfe in QUICK_NFE) * QUICK_IMAGES
    completions = COMPLETED * evaluations_per_image(config)
    parameters = sum(parameter.numel() for parameter in trained.network.parameters())
    return float(chains + completions) * parameters * config.data.image_size**2


def _inpainting(png: bytes) -> Figures:
    caption = (
        "Each row: a test image that the model has never seen, the half that it was given, and what it made of it."
    )
    return Figures(
        heading="Completing half an image",
        text="The same network, not trained for it, invents what is missing, each time in another way.",
        pictures=[
            Picture(
                png, alt="test images, their left halves, and completions", caption=caption, width=560, pixelated=False
            )
        ],
    )
