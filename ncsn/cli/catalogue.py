"""The command line of each step: its summary, and where its inputs come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ncsn.runs.steps import CHECKPOINTED

OWN = "own"  # instead of a URI: the run's own

# Those of `ComputeConfig`, which --help does not import, and what `ncsn doctor` checks of each.
BACKENDS = {
    "local": (),
    "ray-jobs": ("ray jobs",),
    "kuberay": ("kubernetes", "rights", "kuberay", "pod image", "gpus", "queue"),
}
CONTINUING = ("run", *CHECKPOINTED)  # the commands that save checkpoints, and continue from the last one


@dataclass(frozen=True)
class Source:
    """The field of an earlier step's result that an input comes from if no option names it."""

    step: str
    field: str
    what: str
    selectable: bool = False  # instead, the checkpoint that `ncsn select` chose, if it did


@dataclass(frozen=True)
class StepInfo:
    """The command line of one step."""

    summary: str
    inputs: Mapping[str, Source] = field(default_factory=dict)
    on_demand: Mapping[str, Source] = field(default_factory=dict)  # inputs only if an option of that name is given
    faults: bool = False  # takes --inject


_DATASET = Source("ingest", "uri", "ingested dataset")
_CHOSEN = Source("train", "checkpoint", "checkpoint", selectable=True)
_SAMPLED = Source("sample", "checkpoint", "checkpoint of the samples")  # not always the last, see `ncsn select`
_SAMPLES = Source("sample", "uri", "folder of samples")

# The steps of the pipeline, in its order.
CATALOGUE: Mapping[str, StepInfo] = {
    "ingest": StepInfo("Read the images into the store, once."),
    "tune": StepInfo("Search for better settings, if the config has a search.", inputs={"dataset": _DATASET}),
    "train": StepInfo("Train the score network, or resume it.", inputs={"dataset": _DATASET}, faults=True),
    "sample": StepInfo(
        "Generate images with the configured sampler.",
        inputs={"checkpoint": _CHOSEN},
        on_demand={"score": _DATASET},
        faults=True,
    ),
    "evaluate": StepInfo(
        "Measure the samples, and real images for comparison.",
        inputs={"samples": _SAMPLES, "dataset": _DATASET},
    ),
    "register": StepInfo(
        "Register the model in MLflow.",
        inputs={
            "checkpoint": _SAMPLED,
            "evaluation": Source("evaluate", "uri", "evaluation that decides whether it becomes champion"),
        },
    ),
    "report": StepInfo(
        "Write one HTML page about the run.",
        inputs={"evaluation": Source("evaluate", "uri", "evaluation to report on")},
    ),
}

# Steps, and commands that run like a step on a finished run.
STEP_INFO: Mapping[str, StepInfo] = {
    **CATALOGUE,
    "select": StepInfo(
        "Choose the best checkpoint of a run by samples of each; sample, evaluate and register it.",
        inputs={"dataset": _DATASET},
    ),
}
