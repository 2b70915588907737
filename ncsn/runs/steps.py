"""The steps of a run, and commands that run like a step on a finished one, with what sets them apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepTraits:
    """What sets a step apart from the others."""

    name: str
    always: bool = False  # part of every run
    elsewhere: bool = False  # where `compute.backend` says, under its launcher's lease; others are too small
    by_workers: bool = False  # reserves all workers; other steps one
    checkpointed: bool = False  # saves checkpoints, and continues from the last one


# Those of the pipeline are in its order.
TRAITS = (
    StepTraits("ingest", always=True),
    StepTraits("tune", elsewhere=True, checkpointed=True),
    StepTraits("train", always=True, elsewhere=True, by_workers=True, checkpointed=True),
    StepTraits("sample", always=True, elsewhere=True, by_workers=True),
    StepTraits("evaluate", always=True, elsewhere=True, by_workers=True),
    StepTraits("register", always=True),
    StepTraits("report", always=True),
    StepTraits("select", elsewhere=True, by_workers=True),
)

STEPS = tuple(step.name for step in TRAITS if step.always)
STEPS_ELSEWHERE = tuple(step.name for step in TRAITS if step.elsewhere)
STEPS_BY_WORKERS = tuple(step.name for step in TRAITS if step.by_workers)
CHECKPOINTED = tuple(step.name for step in TRAITS if step.checkpointed)
