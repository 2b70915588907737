"""Time to quality: the Fréchet distance of annealed Langevin dynamics at 1,000 evaluations, by faster samplers."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.digits_run import digits_run
from benchmarks.measure import Row
from benchmarks.samplers import make_images, measured, settings_of
from ncsn.model.checkpoint import load_checkpoint

IMAGES, BATCH = 256, 64
# 1,001 evaluations at the 20 levels of the digits; the last one removes the noise.
LANGEVIN = {
    "name": "annealed Langevin dynamics",
    "precision": "float32",
    "sampler": {"kind": "annealed_langevin", "steps_per_level": 50, "epsilon": 9.0e-5},
}
QUICKER = [
    {
        "name": f"EDM grid of {steps} steps, churn {churn}",
        "precision": "float32",
        "sampler": {"kind": "karras_heun", "num_steps": steps, "churn": churn},
    }
    for steps, churn in ((5, 0), (8, 0), (12, 4), (18, 8))
]


def rows() -> list[Row]:
    """Time to quality on the digits, in CPU seconds of one core, which other load on the machine changes little."""
    run = digits_run()
    trained = run.step("train").result
    checkpoint = load_checkpoint(trained["checkpoint"])
    with tempfile.TemporaryDirectory() as work:
        common = {"num_images": IMAGES, "batch_size": BATCH}
        settings = settings_of([LANGEVIN, *QUICKER], checkpoint, common=common, work=Path(work))
        make_images(trained["checkpoint"], settings, processes=2)
        slow, *quicker, real = measured(trained["dataset"], checkpoint.config, settings, num_images=IMAGES)
    as_good = [row for row in quicker if row.fid <= slow.fid]
    best = min(as_good, key=lambda row: row.seconds_per_64, default=slow)
    found = ", ".join(
        f"{row.name}: {row.nfe} evaluations, {row.seconds_per_64:.2f} s, {row.fid:.1f}" for row in quicker
    )
    return [
        Row(
            "sampling",
            f"seconds for 64 digits to the FID of annealed Langevin dynamics at {slow.nfe:,} evaluations, over it",
            slow.seconds_per_64 / best.seconds_per_64,
            target=25,
            detail=f"{slow.seconds_per_64:.1f} s, FID {slow.fid:.1f} with {IMAGES} images, real ones {real.fid:.1f}; "
            f"{best.name} is the quickest as good; {found}",
        )
    ]


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
