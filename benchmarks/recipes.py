"""What the recipes for GPUs would take on H100s: a table of `benchmarks.roofline`.

    python -m benchmarks.recipes [--gpu h100]

Nothing is measured. FLOP and operations are counted, memory traffic is that of a model, `benchmarks.roofline.Work`.
Time is not less than each operation's products or traffic take at the most that the data sheet says; prediction and MFU
allow for twice as much. The operations of a step of one worker, without views, are at least as many kernel launches
where it is not compiled; Adam and the EMA add a few dozen. The exchange of gradients is not counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.roofline import GPUS, SHARE, predict, works
from ncsn.config import Config, from_yaml

CONFIGS = Path(__file__).parents[1] / "configs"


def recipes() -> dict[str, Config]:
    """The configs for GPUs by name."""
    found = {path.stem: from_yaml(path.read_text()) for path in sorted(CONFIGS.glob("*.yaml"))}
    return {name: config for name, config in found.items() if config.compute.use_gpu}


def row(name: str, config: Config, *, gpu: str) -> str:
    """A line of Markdown."""
    predicted, (_, training, _) = predict(config, gpu=gpu), works(config)
    workers, images, rate = config.compute.max_workers, training.images, predicted["images_per_second"]
    train, sample = (predicted["steps"][step]["seconds"] / 3600 for step in ("train", "sample"))
    cells = (
        f"`{name}`",
        f"{workers} x {images}",
        f"{predicted['parameters'] / 1e6:.1f} M",
        f"{training.flop / 1e9:.1f}",
        f"{training.bytes * images / 1e9:.1f}",
        f"{len(training.operations):,}",
        f"{1e3 * SHARE * images * workers / rate:.1f}",
        f"{rate:,.0f}",
        f"{100 * rate * training.flop / workers / GPUS[gpu][0]:.0f} %",
        f"{train:.1f}",
        f"{sample:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    gpu = parser.parse_args().gpu
    columns = ("recipe", "GPUs x images", "parameters", "GFLOP/image", "GB/step", "operations", "least ms/step")
    predicted = ("images/s", "MFU", "hours", "hours to sample")
    print(f"| {' | '.join((*columns, *predicted))} |\n|---|{'---:|' * (len(columns) + len(predicted) - 1)}")
    for name, config in recipes().items():
        print(row(name, config, gpu=gpu))


if __name__ == "__main__":
    main()
