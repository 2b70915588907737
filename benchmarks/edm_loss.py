"""The held-out loss of trained networks at the same sigmas, whatever noise and weight each was trained with.

    python -m benchmarks.edm_loss DATASET CHECKPOINT... [--mean -1.40] [--std 1.2] [--sigma-data 0.41] [--images 1000]

DATASET is the URI of an ingested dataset with a test split, CHECKPOINT that of a checkpoint or a registered model's
files, of a network that takes any sigma. The loss is measured at ten equally probable sigmas of the lognormal
distribution, with the same noise for every checkpoint. `loss_edm` is the mean over them with the weight of Karras et
al. 2022, as `val/loss_edm` of a training has it; its error is that of the mean over the images.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from numpy.typing import NDArray

from ncsn.core.keyed_random import COMMON_SEED, Stream
from ncsn.core.losses import EdmWeight, losses_at
from ncsn.core.training_noise import LognormalNoise
from ncsn.data.format import Rows, read_split
from ncsn.model.checkpoint import TrainedNetwork, load_checkpoint
from ncsn.training.batches import encoded, gray_words

BATCH = 250


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.edm_loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset")
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--mean", type=float, default=-1.40)
    parser.add_argument("--std", type=float, default=1.2)
    parser.add_argument("--sigma-data", type=float, default=0.41)
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    test = read_split(options.dataset, "test")
    rows = Rows(test.images[: options.images], test.labels[: options.images])
    sigmas, weight = LognormalNoise(options.mean, options.std).bins, EdmWeight(options.sigma_data)
    print("loss_edm ± error  " + " ".join(f"{sigma:>7.3g}" for sigma in sigmas.tolist()) + "  checkpoint")
    for checkpoint in options.checkpoints:
        losses = held_out_losses(load_checkpoint(checkpoint), rows, sigmas=sigmas)
        edm = (weight(sigmas.double()).numpy()[:, None] * losses).mean(axis=0)
        values = " ".join(f"{loss:7.4f}" for loss in losses.mean(axis=1))
        print(f"{edm.mean():.4f} ± {edm.std() / len(edm) ** 0.5:.4f}   {values}  {checkpoint}", flush=True)


def held_out_losses(trained: TrainedNetwork, rows: Rows, *, sigmas: torch.Tensor) -> NDArray[np.float64]:
    """Normalized loss of each image at each sigma [S, N]; the noise is that of the held-out loss of a training."""
    parts = []
    for first in range(0, len(rows.images), BATCH):
        part = slice(first, first + BATCH)
        images = torch.from_numpy(np.array(rows.images[part]))
        gray = gray_words(trained.config, images, seed=COMMON_SEED, stream=Stream.HELD_OUT_DEQUANTIZE, first=first)
        x = encoded(trained.config, images, gray)
        labels = None if trained.config.data.num_classes is None else torch.from_numpy(np.array(rows.labels[part]))
        with torch.inference_mode():
            parts.append(
                losses_at(
                    trained.network,
                    x,
                    first=first,
                    sigmas=sigmas,
                    levels=None,
                    stream=Stream.HELD_OUT_NOISE,
                    labels=labels,
                )
            )
    return torch.cat(parts, dim=1).double().numpy()


if __name__ == "__main__":
    main()
