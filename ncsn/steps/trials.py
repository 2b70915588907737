"""What the trials of a search come to: the best of them, the table, the plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ncsn.config import Config
from ncsn.config.search import EPSILON, variant
from ncsn.distributed.trials import Rung, SearchPlan, TrialRecord
from ncsn.errors import UserError
from ncsn.report.plots import epsilon_versus_quality, search_coordinates
from ncsn.report.style import to_png


def best_trial(trials: Sequence[TrialRecord], *, accidents: Mapping[str, str]) -> TrialRecord:
    """Of the trials that got furthest the one with the least objective, the earlier one of equals.

    Args:
        trials: All of a search.
        accidents: URI of a trial's folder -> what ended it from outside.

    Raises:
        UserError: if none reached a rung.
    """
    sound = [trial for trial in trials if trial.failure is None and trial.rungs]
    if not sound:
        reasons = [trial.failure or accidents.get(trial.uri) or "it reached no rung" for trial in trials]
        raise UserError(
            "search.space",
            f"all {len(trials)} trials failed; the first: {reasons[0].strip().splitlines()[-1]}",
            hint="narrow it to settings that train",
        )
    furthest = max(trial.rungs[-1].images_seen for trial in sound)
    level = [trial for trial in sound if trial.rungs[-1].images_seen == furthest]
    return min(level, key=lambda trial: (trial.rungs[-1].objective, trial.number))


def best_config(config: Config, best: TrialRecord) -> Config:
    """The experiment with the best trial's settings and sampler, ready to train, without a search."""
    return variant(variant(config, best.values), {"sampling.sampler": best.rungs[-1].sampler})


def baseline_rung(plan: SearchPlan, trials: Sequence[TrialRecord], *, images_seen: int) -> float | None:
    """What the config as it stands, with its own sampler, reached at that many images; None if it was not tried."""
    sampler = plan.own_sampler().model_dump(mode="json")
    for trial in trials:
        if trial.values == plan.baseline:
            for rung in trial.rungs:
                if rung.images_seen == images_seen:
                    return next((judged.objective for judged in rung.sweep if judged.sampler == sampler), None)
    return None


def table(trials: Sequence[TrialRecord], *, accidents: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row of plain values per trial, in the order in which they were started."""
    return [_row(trial, accidents) for trial in trials]


def coordinates_png(trials: Sequence[TrialRecord], *, objective: str) -> bytes:
    """Every trial's settings, how far it got and what it reached there, as parallel coordinates."""
    settings = {path: [trial.values[path] for trial in trials] for path in trials[0].values}
    last = [_last(trial) for trial in trials]
    if any(rung and "epsilon" in rung.sampler for rung in last):
        settings[EPSILON] = [rung.sampler["epsilon"] if rung else math.nan for rung in last]
    settings["images seen"] = [rung.images_seen if rung else math.nan for rung in last]
    quality = [
        rung.objective if rung and trial.failure is None else math.nan for trial, rung in zip(trials, last, strict=True)
    ]
    return to_png(search_coordinates(settings, quality, quality_label=objective))


def epsilon_png(best: TrialRecord, *, objective: str) -> bytes | None:
    """What each epsilon reached on the best trial's last checkpoint; None for a sampler without one."""
    rung = best.rungs[-1]
    if "epsilon" not in rung.sampler:
        return None
    figure = epsilon_versus_quality(
        [judged.sampler["epsilon"] for judged in rung.sweep],
        [math.nan if judged.objective is None else judged.objective for judged in rung.sweep],
        quality_label=objective,
        chosen=rung.sampler["epsilon"],
    )
    return to_png(figure)


def _row(trial: TrialRecord, accidents: Mapping[str, str]) -> dict[str, Any]:
    rung = _last(trial)
    return {
        "trial": trial.number,
        "values": trial.values,
        "status": trial.status,
        "images_seen": rung.images_seen if rung else 0,
        "objective": rung.objective if rung else None,
        "sampler": rung.sampler if rung else None,
        "seconds": round(sum(rung.seconds for rung in trial.rungs), 1),
        "reason": trial.failure or accidents.get(trial.uri, ""),
    }


def _last(trial: TrialRecord) -> Rung | None:
    return trial.rungs[-1] if trial.rungs else None
