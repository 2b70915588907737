"""Signs of overfitting: the held-out loss over training, and generated images that are too near to training images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ncsn.core.held_out import HARMFUL, Alarm
from ncsn.report.page import Plot, Section
from ncsn.report.plots import held_out_losses
from ncsn.report.style import to_svg
from ncsn.report.words import Reading
from ncsn.runs.curves import HeldOutCurves

# Of the median distance to the nearest training image, generated over real. Images of a good model are a little nearer
# than real ones, because they lack rare detail.
NEAR = 0.7

ADVICE = (
    "Add images, train with data.augmentation, or set data.horizontal_flip if mirrored images are as good; or train a "
    "smaller network, or for fewer train.num_images."
)


def overfitting_hints(curves: HeldOutCurves) -> list[str]:
    """A sentence if the held-out loss at the end says that the model overfits, or begins to."""
    alarm, last = curves.last.alarm(), curves.last
    if alarm is None:
        return []
    bins = list(alarm.bins)
    worst = bins[int(np.argmax(last.gap[bins] / last.held_out[bins]))]
    example = (
        f"at sigma {curves.sigmas[worst]:.3g} it is {last.held_out[worst]:.3g} on held-out images and "
        f"{last.held_out[worst] - last.gap[worst]:.3g} on training images"
    )
    if not alarm.harmful:
        return [
            f"{_where(curves, alarm)} the loss is higher on held-out images than on training images, by more than "
            f"chance explains but not by more than {HARMFUL:.0%}: {example}. The model begins to overfit."
        ]
    best = int(np.argmin(curves.loss))
    sooner = f" The held-out loss was lowest at {curves.images_seen[best]:,.0f} images."
    return [
        f"The model overfits. {_where(curves, alarm)} its loss is clearly higher on images that it has not seen than "
        f"on its training images: {example}.{sooner if best < len(curves.loss) - 1 else ''} {ADVICE}"
    ]


def _where(curves: HeldOutCurves, alarm: Alarm) -> str:
    first, last = curves.sigmas[alarm.bins[0]], curves.sigmas[alarm.bins[-1]]
    return f"At sigma {first:.3g}" if first == last else f"At sigma {last:.3g} to {first:.3g}"


def copying_hints(generated: Mapping[str, Reading], real: Mapping[str, Reading], *, copies: str) -> list[str]:
    """Warnings that generated images are nearer to the training images than held-out images are.

    `generated` and `real` are metrics of the samples and of real test images; `copies` says how many copies there are,
    if they are more than chance explains.
    """
    hints = [f"The model memorizes training images. {copies}. {ADVICE}"] if copies else []
    if "nn_distance" in generated and "nn_distance" in real:
        own, others = generated["nn_distance"].value, real["nn_distance"].value
        if own < NEAR * others:
            hints.append(
                "The generated images are nearer to the training images than held-out images are: the median distance "
                f"to the nearest one is {own:,.0f}, and {others:,.0f} for held-out images."
            )
    return hints


def held_out_section(curves: HeldOutCurves) -> Section:
    """The curves of both losses, and the gap at each noise level at the end."""
    last, alarm = curves.last, curves.last.alarm()
    figure = held_out_losses(
        curves.images_seen,
        curves.loss,
        curves.loss - curves.gap,
        sigmas=curves.sigmas,
        gap=last.gap / last.held_out,
        error=last.error / last.held_out,
        alarmed=() if alarm is None else alarm.bins,
    )
    return Section(
        heading="Held-out loss",
        text="The loss on test images, which training never uses, and on training images, both with the EMA weights "
        "and without augmentation. A model of the distribution has the same loss on both. One that learns its training "
        "images by heart has a growing gap between the two, and in the end its held-out loss rises. The gap at each "
        "noise level is that of the last checkpoint, with two standard errors.",
        plots=[Plot(to_svg(figure, salt="held-out"), alt="Loss of held-out and of training images over training")],
        hints=overfitting_hints(curves),
    )
