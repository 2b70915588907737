"""Which settings to try next: Optuna's samplers, without repetition, and with memory of earlier trials."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from ncsn.config.search import ChoiceDomain, Domain, LogDomain, significant
from ncsn.distributed.trial_records import trial_key

_TRIES = 1000
"""Draws without anything new after which the space counts as used up, besides those for the trials there are."""


class Suggestions:
    """Draws points of a search space; each is given once.

    Args:
        space: Dotted path -> range.
        whole: The paths whose settings are whole numbers.
        algorithm: `optuna` or `random`.
        seed: Of the draws. The same seed and the same results give the same draws.
        first: Points to give before any draw.
    """

    def __init__(
        self,
        space: Mapping[str, Domain],
        *,
        whole: Iterable[str],
        algorithm: str,
        seed: int,
        first: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        kinds = {"optuna": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        self._study = optuna.create_study(sampler=kinds[algorithm](seed=seed))
        self._space = dict(space)
        self._distributions = {path: _distribution(domain, path in set(whole)) for path, domain in space.items()}
        self._first = [dict(values) for values in first]
        self._given: set[str] = set()

    def next(self) -> dict[str, Any] | None:
        """Values that were not given or learned before; None if there seem to be no more."""
        while self._first:
            values = self._first.pop(0)
            if self._is_new(values):
                return values
        for _ in range(_TRIES + len(self._given)):
            drawn = self._study.ask(self._distributions)
            values = {path: self._decode(path, value) for path, value in drawn.params.items()}
            # What becomes of the point is told as a trial of its own, whoever drew it.
            self._study.tell(drawn, state=TrialState.FAIL)
            if self._is_new(values):
                return values
        return None

    def learn(self, values: Mapping[str, Any], objective: float) -> None:
        """Take in what a trial reached, less is better; it is not given again."""
        self._given.add(trial_key(values))
        params = {path: self._encode(path, value) for path, value in values.items()}
        if any(value is None for value in params.values()):
            return  # the config's own values may lie outside the space
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = create_trial(params=params, distributions=self._distributions, value=objective)
        self._study.add_trial(trial)

    def _is_new(self, values: Mapping[str, Any]) -> bool:
        key = trial_key(values)
        if key in self._given:
            return False
        self._given.add(key)
        return True

    def _decode(self, path: str, value: Any) -> Any:
        domain = self._space[path]
        if isinstance(domain, ChoiceDomain):
            return _plain(domain.values[value])
        return significant(value) if isinstance(value, float) else value

    def _encode(self, path: str, value: Any) -> Any:
        """The number that Optuna has for it, or None if it has none."""
        domain = self._space[path]
        if isinstance(domain, ChoiceDomain):
            values = [_plain(each) for each in domain.values]
            return values.index(value) if value in values else None
        if value is None or not (significant(domain.low) <= value <= significant(domain.high)):
            return None
        return min(max(value, domain.low), domain.high)


def _distribution(domain: Domain, whole: bool) -> BaseDistribution:  # noqa: FBT001
    if isinstance(domain, ChoiceDomain):
        return CategoricalDistribution(range(len(domain.values)))
    log = isinstance(domain, LogDomain)
    if whole:
        return IntDistribution(int(domain.low), int(domain.high), log=log)
    return FloatDistribution(domain.low, domain.high, log=log)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
