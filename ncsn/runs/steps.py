"""The steps of a run, and commands that run like a step on a finished one: what each is, declared once.

A new one is a line of `STEP_TABLE`, and a module of `ncsn.steps` with its name, as `ncsn.steps.execute` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ncsn.config import Config
from ncsn.config.load import DECIDING
from ncsn.runs.results import (
    EvaluateResult,
    ExportResult,
    IngestResult,
    RegisterResult,
    ReportResult,
    Result,
    SampleResult,
    SearchResult,
    SelectResult,
    TrainResult,
    UtilityResult,
)

OWN = "own"  # instead of a URI: the run's own
Work = Literal["training", "sampling", "features", "classifiers"]


@dataclass(frozen=True)
class Input:
    """The field of an earlier step's result that an input comes from if nobody names it."""

    result: type[Result]
    field: str
    what: str
    selectable: bool = False  # instead, the checkpoint that `ncsn select` chose, if it did


@dataclass(frozen=True)
class Pod:
    """What a task's own pod asks for and may use at most: CPUs and memory, as Kubernetes writes them."""

    request: tuple[str, str]
    limit: tuple[str, str]


@dataclass(frozen=True)
class Step:
    """What a step does, what decides its result, where its inputs come from, and where and how it runs."""

    summary: str
    result: type[Result]  # knows the name of the step
    decided_by: tuple[str, ...]  # sections of the config; where they differ, MLflow has another run of the step
    inputs: Mapping[str, Input] = field(default_factory=dict)
    on_demand: Mapping[str, Input] = field(default_factory=dict)  # inputs only if they are asked for
    always: bool = False  # part of every run
    section: str = ""  # of the config; part of a run that has it
    addressed: bool = False  # its command takes an address instead of a config
    # What its workers do, which decides their memory. They are where `compute.backend` says, under a launcher's lease.
    workers: tuple[Work, ...] = ()
    pod: Pod | None = None  # of a step without workers, in a pipeline
    continues: bool = False  # it saves checkpoints, and goes on from the last one: one process at a time
    curves: bool = False  # its MLflow run has the curves of training
    files: tuple[str, ...] = ()  # fields of the result: URIs, or lists of them, without which it is of no use
    links: Mapping[str, str] = field(default_factory=dict)  # on the page of a pipeline run: name -> field of the result
    module: str = ""  # with `prepare`; empty: that of `ncsn.steps` with the name of the step

    @property
    def name(self) -> str:
        return self.result.step

    def is_part_of(self, config: Config) -> bool:
        """Whether a run of this config has the step."""
        return self.always or bool(self.section and getattr(config, self.section) is not None)


_DATASET = Input(IngestResult, "uri", "ingested dataset")
_CHOSEN = Input(TrainResult, "checkpoint", "checkpoint", selectable=True)
_SAMPLED = Input(SampleResult, "checkpoint", "checkpoint of the samples")  # not always the last, see `ncsn select`
_SAMPLES = Input(SampleResult, "uri", "folder of samples")
_SMALL = Pod(("200m", "1Gi"), ("2", "4Gi"))

STEP_TABLE: dict[str, Step] = {
    step.name: step
    for step in (
        # Those of the pipeline, in its order.
        Step(
            "Read the images into the store, once.",
            IngestResult,
            decided_by=("data",),
            always=True,
            addressed=True,
            pod=Pod(("500m", "1Gi"), ("4", "8Gi")),
            links={"dataset": "uri", "dataset digest": "digest"},
        ),
        Step(
            "Search for better settings, if the config has a search.",
            SearchResult,
            decided_by=(*DECIDING, "sampling", "evaluation", "search"),
            inputs={"dataset": _DATASET},
            section="search",
            workers=("training", "sampling", "features"),
            continues=True,
            files=("config", "table", "plots"),
        ),
        Step(
            "Train the score network, or resume it.",
            TrainResult,
            decided_by=DECIDING,
            inputs={"dataset": _DATASET},
            always=True,
            workers=("training",),
            continues=True,
            curves=True,
            links={"checkpoint": "checkpoint"},
        ),
        Step(
            "Generate images with the configured sampler.",
            SampleResult,
            decided_by=(*DECIDING, "sampling"),
            inputs={"checkpoint": _CHOSEN},
            on_demand={"score": _DATASET},
            always=True,
            addressed=True,
            workers=("sampling",),
            files=("uri", "grid", "strip"),
        ),
        Step(
            "Measure the samples, and real images for comparison.",
            EvaluateResult,
            decided_by=(*DECIDING, "sampling", "evaluation"),
            inputs={"samples": _SAMPLES, "dataset": _DATASET},
            always=True,
            addressed=True,
            workers=("features",),
            files=("uri", "neighbors"),
        ),
        Step(
            "Train classifiers with and without generated images, and compare them.",
            UtilityResult,
            decided_by=(*DECIDING, "sampling", "utility"),
            inputs={"checkpoint": _CHOSEN, "dataset": _DATASET},
            section="utility",
            addressed=True,
            workers=("sampling", "classifiers"),
            files=("uri", "plot"),
        ),
        Step(
            "Register the model in MLflow.",
            RegisterResult,
            decided_by=(*DECIDING, "sampling", "evaluation"),
            inputs={
                "checkpoint": _SAMPLED,
                "evaluation": Input(EvaluateResult, "uri", "evaluation that decides whether it becomes champion"),
            },
            always=True,
            pod=_SMALL,
            links={"model": "uri"},
        ),
        Step(
            "Write one HTML page about the run.",
            ReportResult,
            decided_by=(*DECIDING, "sampling", "evaluation"),
            inputs={"evaluation": Input(EvaluateResult, "uri", "evaluation to report on")},
            always=True,
            pod=_SMALL,
            links={"report": "uri"},
            files=("uri",),
        ),
        # Those on a finished run.
        Step(
            "Write a data set of generated images, without copies of training images.",
            ExportResult,
            decided_by=(*DECIDING, "sampling", "export"),
            inputs={"checkpoint": _CHOSEN, "dataset": _DATASET},
            addressed=True,
            workers=("sampling",),
            files=("card",),
        ),
        Step(
            "Choose the best checkpoint of a run by samples of each; sample, evaluate and register it.",
            SelectResult,
            decided_by=(*DECIDING, "sampling", "evaluation", "select"),
            inputs={"dataset": _DATASET},
            workers=("sampling", "features"),
            files=("uri", "plot", "kept"),
        ),
    )
}
PIPELINE = tuple(name for name, step in STEP_TABLE.items() if step.always or step.section)
FIRST = PIPELINE[0]
BEST = "-best"  # behind the name of a searched run, the name of the run that trains what was found
SEARCH = SearchResult.step


def steps_of(config: Config) -> tuple[str, ...]:
    """The steps of a run of this config, in their order."""
    return tuple(name for name, step in STEP_TABLE.items() if step.is_part_of(config))
