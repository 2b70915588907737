"""A step that somebody adds: number, mean and deviation of the samples. Its module is all that there is of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ncsn import storage
from ncsn.data.format import MANIFEST
from ncsn.data.samples import SampleSet
from ncsn.runs.results import Result, SampleResult
from ncsn.runs.run import Run
from ncsn.runs.steps import Input, Step
from ncsn.steps.prepared import Context, Prepared


@dataclass(frozen=True)
class DescribeResult(Result):
    """What the samples are like."""

    step = "describe"

    uri: str
    count: int
    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"{self.count} images, {self.mean:.1f} ± {self.deviation:.1f}"


STEP = Step(
    "Describe the samples.",
    DescribeResult,
    decided_by=("sampling",),
    inputs={"samples": Input(SampleResult, "uri", "folder of samples")},
    workers=("features",),
    files=("uri",),
    module=__name__,
)


def prepare(run: Run, *, samples: str) -> Describe:
    """All images of a folder of samples."""
    count = storage.read_json(storage.join(samples, MANIFEST))["num_images"]
    return Describe(run.config, {"samples": samples, "count": count}, samples, count)


@dataclass(frozen=True)
class Describe(Prepared[DescribeResult]):
    """The pixels of the samples in two numbers."""

    samples: str
    count: int

    def work(self, context: Context) -> DescribeResult:
        pixels = np.asarray(SampleSet(self.samples, self.count).read(0, self.count), float)
        uri = storage.join(context.folder.uri, "describe.json")
        result = DescribeResult(uri, self.count, float(pixels.mean()), float(pixels.std()))
        storage.write_json(uri, result.plain())
        context.tracked.log_metrics({"describe/mean": result.mean})
        return result
