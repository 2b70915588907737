"""The steps of a run, and commands that run like a step on a finished one: their inputs, and where they run.

A new one is a line of `STEP_TABLE`, and a module of `ncsn.steps` with its name, as `ncsn.steps.execute` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ncsn.config import Config

OWN = "own"  # instead of a URI: the run's own


@dataclass(frozen=True)
class Input:
    """The field of an earlier step's result that an input comes from if nobody names it."""

    step: str
    field: str
    what: str
    selectable: bool = False  # instead, the checkpoint that `ncsn select` chose, if it did


@dataclass(frozen=True)
class Step:
    """What a step does, where its inputs come from, and where and how it runs."""

    summary: str
    inputs: Mapping[str, Input] = field(default_factory=dict)
    on_demand: Mapping[str, Input] = field(default_factory=dict)  # inputs only if they are asked for
    always: bool = False  # part of every run
    section: str = ""  # of the config; part of a run that has it
    elsewhere: bool = False  # where `compute.backend` says, under its launcher's lease; others are too small


_DATASET = Input("ingest", "uri", "ingested dataset")
_CHOSEN = Input("train", "checkpoint", "checkpoint", selectable=True)
_SAMPLED = Input("sample", "checkpoint", "checkpoint of the samples")  # not always the last, see `ncsn select`
_SAMPLES = Input("sample", "uri", "folder of samples")

STEP_TABLE: Mapping[str, Step] = {
    # Those of the pipeline, in its order.
    "ingest": Step("Read the images into the store, once.", always=True),
    "search": Step(
        "Search for better settings, if the config has a search.",
        inputs={"dataset": _DATASET},
        section="search",
        elsewhere=True,
    ),
    "train": Step("Train the score network, or resume it.", inputs={"dataset": _DATASET}, always=True, elsewhere=True),
    "sample": Step(
        "Generate images with the configured sampler.",
        inputs={"checkpoint": _CHOSEN},
        on_demand={"score": _DATASET},
        always=True,
        elsewhere=True,
    ),
    "evaluate": Step(
        "Measure the samples, and real images for comparison.",
        inputs={"samples": _SAMPLES, "dataset": _DATASET},
        always=True,
        elsewhere=True,
    ),
    "utility": Step(
        "Train classifiers with and without generated images, and compare them.",
        inputs={"checkpoint": _CHOSEN, "dataset": _DATASET},
        section="utility",
        elsewhere=True,
    ),
    "register": Step(
        "Register the model in MLflow.",
        inputs={
            "checkpoint": _SAMPLED,
            "evaluation": Input("evaluate", "uri", "evaluation that decides whether it becomes champion"),
        },
        always=True,
    ),
    "report": Step(
        "Write one HTML page about the run.",
        inputs={"evaluation": Input("evaluate", "uri", "evaluation to report on")},
        always=True,
    ),
    # Those on a finished run.
    "export": Step(
        "Write a data set of generated images, without copies of training images.",
        inputs={"checkpoint": _CHOSEN, "dataset": _DATASET},
        elsewhere=True,
    ),
    "select": Step(
        "Choose the best checkpoint of a run by samples of each; sample, evaluate and register it.",
        inputs={"dataset": _DATASET},
        elsewhere=True,
    ),
}

STEPS = tuple(name for name, info in STEP_TABLE.items() if info.always)
BEST = "-best"  # behind the name of a searched run, the name of the run that trains what was found
SEARCH = "search"
PIPELINE = tuple(name for name, info in STEP_TABLE.items() if info.always or info.section)
STEPS_ELSEWHERE = tuple(name for name, info in STEP_TABLE.items() if info.elsewhere)
STEPS_BY_WORKERS = tuple(name for name in STEPS_ELSEWHERE if name != SEARCH)  # reserve all workers; other steps one
CONTINUING = ("run", SEARCH, "train")  # commands that save checkpoints, and continue from the last one


def steps_of(config: Config) -> tuple[str, ...]:
    """The steps of a run of this config, in their order."""
    return tuple(step for step in PIPELINE if is_asked(step, config))


def is_asked(step: str, config: Config) -> bool:
    """Whether a run of this config has the step of the pipeline."""
    section = STEP_TABLE[step].section
    return not section or getattr(config, section) is not None
