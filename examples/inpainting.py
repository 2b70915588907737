"""Complete images of which a half is known, with a network that was trained on whole ones (Song & Ermon 2019).

Algorithm 2 is annealed Langevin dynamics that sets the known pixels at each step to the image plus the level's noise.
One image has many completions: the figure shows several of each.

    python examples/inpainting.py --out inpainted.png
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from small_images import Model, arguments, digits, show, train
from torch import Tensor
from torch.nn.functional import pad

from ncsn.core.keyed_random import KeyedNoise
from ncsn.core.samplers.langevin import inpaint

IMAGES = 12
COMPLETIONS = 3  # of each image


def complete(model: Model, images: Tensor, known: Tensor) -> Tensor:
    """Images [N, 1, H, W] whose pixels are drawn where `known`, bool [H, W], is False."""
    sigmas = model.network.sigmas
    noise = KeyedNoise(0, first=0, count=len(images), shape=images.shape[1:])
    return inpaint(
        model.network,
        x=noise.uniform(0),
        reference=images,
        mask=known,
        sigmas=sigmas,
        epsilon=0.2 * float(sigmas[-1]) ** 2,  # so that the step at each level is a fifth of sigma^2
        steps_per_level=20,
        noise=noise,
    )


def main() -> None:
    given = arguments(__doc__, out="inpainted.png")
    images = digits()
    model = train(images, num_images=140_000 if given.full else 40_000)
    truth = images.test[:IMAGES]
    left = torch.zeros(truth.shape[-2:], dtype=torch.bool)
    left[:, : truth.shape[-1] // 2] = True
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    for axes, (name, known) in zip(figure.subplots(1, 2), {"left": left, "upper": left.T}.items(), strict=True):
        completed = complete(model, truth.repeat(COMPLETIONS, 1, 1, 1), known).split(IMAGES)
        rows = [pad(row, (0, 1, 0, 1), value=0.3) for row in (torch.where(known, truth, 0.5), *completed, truth)]
        show(axes, rows, f"given the {name} half")
        height = rows[0].shape[-2]
        axes.set_yticks([0.5 * height, (len(rows) - 0.5) * height], ["given", "truth"])
    figure.savefig(given.out, dpi=110)


if __name__ == "__main__":
    main()
