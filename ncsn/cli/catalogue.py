"""The steps as the command line shows them. Imports nothing, so that `ncsn --help` is quick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

OWN = "own"
"""Instead of a URI: that of the run."""


@dataclass(frozen=True)
class Source:
    """Where an input comes from if no option names it: a field of the result of an earlier step of the same run."""

    step: str
    field: str
    what: str


@dataclass(frozen=True)
class StepInfo:
    """One step.

    Attributes:
        summary: What it does, one line.
        inputs: Argument of the step -> where its URI comes from.
        on_demand: The same for what is used only if an option of that name is given, with a URI or without.
        leased: Whether it may run on another machine and then watches its launcher's lease.
        rehearsed: Whether failures can be injected.
    """

    summary: str
    inputs: Mapping[str, Source] = field(default_factory=dict)
    on_demand: Mapping[str, Source] = field(default_factory=dict)
    leased: bool = False
    rehearsed: bool = False


CATALOGUE: Mapping[str, StepInfo] = {
    "ingest": StepInfo("Read the images into the store, once."),
    "tune": StepInfo(
        "Search for better settings, if the config has a search.",
        {"dataset": Source("ingest", "uri", "ingested data set")},
        leased=True,
    ),
    "train": StepInfo(
        "Train the score network, or resume it.",
        {"dataset": Source("ingest", "uri", "ingested data set")},
        leased=True,
        rehearsed=True,
    ),
    "sample": StepInfo(
        "Generate images by annealed Langevin dynamics.",
        {"checkpoint": Source("train", "checkpoint", "checkpoint")},
        on_demand={"score": Source("ingest", "uri", "ingested data set")},
        leased=True,
        rehearsed=True,
    ),
    "evaluate": StepInfo(
        "Measure the samples, next to real images.",
        {
            "samples": Source("sample", "uri", "folder of samples"),
            "dataset": Source("ingest", "uri", "ingested data set"),
        },
        leased=True,
    ),
    "register": StepInfo(
        "Put the model into MLflow's registry.",
        {
            "checkpoint": Source("train", "checkpoint", "checkpoint"),
            "evaluation": Source("evaluate", "uri", "evaluation that decides about the alias champion"),
        },
    ),
    "report": StepInfo(
        "Write one HTML page about the run.", {"evaluation": Source("evaluate", "uri", "evaluation to report on")}
    ),
}

BESIDE_THE_PIPELINE: Mapping[str, StepInfo] = {
    "figures": StepInfo(
        "Draw a finished run: losses, levels, inpainting, interpolation, neighbours, quality over NFE.",
        {
            "checkpoint": Source("train", "checkpoint", "checkpoint"),
            "samples": Source("sample", "uri", "folder of samples"),
            "dataset": Source("ingest", "uri", "ingested data set"),
        },
    ),
}
"""Commands that work like steps on what the pipeline left."""
