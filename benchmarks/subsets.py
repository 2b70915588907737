"""A few training images of each class of a published set as PNG files, in `train/` and `test/`; all test images stay.

    python -m benchmarks.subsets configs/fashion_edm_class.yaml OUT --per-class 100 --draw 0
    python -m benchmarks.subsets configs/fashion_edm_class.yaml OUT --per-class 1000 20      # fewer from class to class
    ncsn init OUT --minutes 20

With two numbers, the first class has the first one, the last class the second, and those between a fixed share less
than the class before. Draws of another number have other images.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ncsn.config import from_yaml
from ncsn.data.format import load_manifest, read_split
from ncsn.steps.ingest import write_images


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a config with the images")
    parser.add_argument("out", type=Path)
    parser.add_argument("--per-class", type=int, nargs="+", required=True)
    parser.add_argument("--draw", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        dataset = write_images(from_yaml(options.recipe.read_text()), store).uri
        names = load_manifest(dataset).class_names
        counts = np.geomspace(options.per_class[0], options.per_class[-1], len(names)).round().astype(int)
        for split in ("train", "test"):
            rows = read_split(dataset, split)
            order = np.random.default_rng(options.draw).permutation(len(rows.labels))
            for label, (name, count) in enumerate(zip(names, counts, strict=True)):
                own = order[rows.labels[order] == label]
                folder = options.out / split / f"{label}-{name.replace('/', '-')}"
                folder.mkdir(parents=True)
                for row in own[:count] if split == "train" else own:
                    image = rows.images[row]
                    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(folder / f"{row:06d}.png")


if __name__ == "__main__":
    main()
