"""Ray Tune around the trials of a search, and Optuna's sampler. The only module that imports ray.tune."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import optuna
import ray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

# Read when Tune starts: no files of its loggers next to ours, and Ctrl-C is for the command to answer.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from ncsn import storage
from ncsn.config.choices import ChoiceDomain, Domain
from ncsn.config.compute import ComputeConfig
from ncsn.config.search import searched_space, setting, significant
from ncsn.distributed.cluster import autoscales
from ncsn.distributed.trials import FAILED, SearchPlan, TrialFolder, TrialRecord, read_trials, run_trial, trial_key

# It misses the files of those loggers.
logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)

# Bytes that Ray reserves for the driver of a trial. It takes no CPU: one would not be left for a worker.
DRIVER_MEMORY = 400 * 2**20

# Draws without anything new after which the space counts as used up, on top of those for the known trials.
_TRIES = 1000

# Of a trial that has started, resumed or reached a rung (false), or is over (true), then with what ended it from
# outside, if something did.
Tell = Callable[[TrialRecord, bool, str | None], None]


def search(plan: SearchPlan, tell: Tell) -> None:
    """Run the remaining trials of a search on the connected cluster; their folders hold the results.

    `tell` is called in this process.
    """
    settings, compute = plan.settings, plan.config.compute
    before = read_trials(plan.trials, last_rung=plan.rungs[-1])
    done = [trial for trial in before if trial.status != "unfinished"]
    left = settings.num_trials - len(done)
    if left <= 0:
        return
    # First the points that were interrupted and the config's own, then new ones.
    space = searched_space(plan.config)
    suggestions = Suggestions(
        space,
        whole=[path for path in space if type(setting(plan.config, path)) is int],
        seed=settings.seed,
        first=[*(trial.values for trial in before if trial.status == "unfinished"), plan.baseline],
    )
    for trial in done:
        suggestions.learn(trial.values, FAILED if trial.failure is not None else trial.rungs[-1].objective)
    # An autoscaler brings the workers of an elastic training.
    grown = compute.max_workers // compute.min_workers if autoscales() else None
    filesystem, path = storage.filesystem(storage.join(plan.trials, ".tune"))

    def trainable(point: dict[str, Any], *, plan: SearchPlan) -> None:
        run_trial(plan, point["values"], report=tune.report)

    tuner = tune.Tuner(
        # A driver that holds a CPU can deadlock with the workers it waits for.
        tune.with_resources(tune.with_parameters(trainable, plan=plan), {"memory": DRIVER_MEMORY}),
        tune_config=tune.TuneConfig(
            num_samples=left,
            max_concurrent_trials=grown or trials_at_once(ray.cluster_resources(), compute),
            search_alg=suggestions,
            scheduler=Halving(plan, earlier=done),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="attempt",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=compute.max_failures),
            callbacks=[_Follow(plan, tell, numbers={trial_key(trial.values): trial.number for trial in before})],
            verbose=0,
        ),
    )
    tuner.fit()


def trials_at_once(resources: Mapping[str, float], compute: ComputeConfig) -> int:
    """How many trials a cluster can hold without any waiting for what another holds.

    Ray names its resources: CPU, GPU, memory in bytes.
    """
    each = {
        "CPU": float(compute.min_workers * compute.cpus_per_worker),
        "GPU": float(compute.min_workers if compute.use_gpu else 0),
        "memory": float(DRIVER_MEMORY),
    }
    # At least one: `require_resources` has refused a cluster without room for its workers.
    return max(1, min(int(resources.get(kind, 0) // need) for kind, need in each.items() if need))


class Suggestions(Searcher):
    """Points of a search space by Optuna's tree-structured Parzen estimator, each suggested once.

    The same seed and the same results give the same draws. Settings at the paths `whole` are whole numbers. The points
    `first` are suggested before any draw.
    """

    # Not OptunaSearch of Ray: it gives a point of a few choices twice, and so the folder of a trial to two of them;
    # refuses a config whose own value is none of a choice's; and after `Tuner.restore` cannot have more trials.

    def __init__(
        self, space: Mapping[str, Domain], *, whole: Collection[str], seed: int, first: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        super().__init__(metric="objective", mode="min")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        self._space = dict(space)
        self._choices: dict[str, list[Any]] = {}  # as plain values, by the numbers that Optuna has for them
        self._distributions: dict[str, BaseDistribution] = {}
        for path, domain in space.items():
            log = domain.kind == "log"
            if isinstance(domain, ChoiceDomain):
                self._choices[path] = [list(each) if isinstance(each, tuple) else each for each in domain.values]
                self._distributions[path] = CategoricalDistribution(range(len(domain.values)))
            elif path in whole:
                self._distributions[path] = IntDistribution(int(domain.low), int(domain.high), log=log)
            else:
                self._distributions[path] = FloatDistribution(domain.low, domain.high, log=log)
        self._first = [dict(values) for values in first]
        self._given: set[str] = set()
        self._open: dict[str, dict[str, Any]] = {}

    def suggest(self, trial_id: str) -> Any:
        """A point that was neither given nor learned before, or that there seem to be no more."""
        for values in self._points():
            key = trial_key(values)
            if key not in self._given:
                self._given.add(key)
                self._open[trial_id] = values
                # One entry, because Tune takes a dot or a list in a value's name for structure.
                return {"values": values}
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:  # noqa: FBT001, FBT002
        """Learn from the last rung, unless the trial was ended from outside."""
        values = self._open.pop(trial_id)
        if result and not error:
            self.learn(values, result["objective"])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the state is in the trials' folders."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called."""

    def _points(self) -> Iterator[dict[str, Any]]:
        while self._first:
            yield self._first.pop(0)
        for _ in range(_TRIES + len(self._given)):
            drawn = self._study.ask(self._distributions)
            values = {}
            for path, value in drawn.params.items():
                if path in self._choices:
                    values[path] = self._choices[path][value]
                else:
                    values[path] = significant(value) if isinstance(value, float) else value
            # The result comes back by `learn` as a new trial, also for points that were not drawn here.
            self._study.tell(drawn, state=TrialState.FAIL)
            yield values

    def learn(self, values: Mapping[str, Any], objective: float) -> None:
        """Take in what a point reached, less is better."""
        self._given.add(trial_key(values))
        params = {}  # Optuna's numbers for the values
        for path, value in values.items():
            domain = self._space[path]
            if isinstance(domain, ChoiceDomain):
                if value not in self._choices[path]:
                    return  # the config's own values may be outside the space
                params[path] = self._choices[path].index(value)
            elif value is None or not (significant(domain.low) <= value <= significant(domain.high)):
                return
            else:
                params[path] = min(max(value, domain.low), domain.high)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = create_trial(params=params, distributions=self._distributions, value=objective)
        self._study.add_trial(trial)


class Halving(ASHAScheduler):
    """Asynchronous successive halving that trains the config's own values to the end, to compare with.

    The trials of `earlier` attempts count without being run again.
    """

    def __init__(self, plan: SearchPlan, *, earlier: Sequence[TrialRecord]) -> None:
        super().__init__(
            time_attr="images_seen",
            metric="objective",
            mode="min",
            grace_period=plan.rungs[0],
            max_t=plan.rungs[-1],
            reduction_factor=plan.settings.reduction_factor,
        )
        self._spared = trial_key(plan.baseline)
        for record in earlier:
            # All that the scheduler reads of a trial.
            trial: Any = SimpleNamespace(trial_id=trial_key(record.values), config={"values": record.values})
            self.on_trial_add(None, trial)  # type: ignore[arg-type]
            for rung in record.rungs:
                self.on_trial_result(None, trial, {"images_seen": rung.images_seen, "objective": rung.objective})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
        decision: str = super().on_trial_result(tune_controller, trial, result)
        spared = trial_key(trial.config["values"]) == self._spared and result["images_seen"] < self._max_t
        return str(self.CONTINUE) if spared else decision


class _Follow(tune.Callback):
    """Numbers the trials, records which were stopped, and tells of all."""

    def __init__(self, plan: SearchPlan, tell: Tell, *, numbers: dict[str, int]) -> None:
        self._plan, self._tell, self._numbers = plan, tell, numbers

    def __reduce__(self) -> tuple[type[tune.Callback], tuple[()]]:
        # Tune pickles its callbacks with an experiment that is never restored: what `tell` knows stays here.
        return tune.Callback, ()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:  # noqa: ARG002
        values = trial.config["values"]
        self._folder(trial).start(self._numbers.setdefault(trial_key(values), len(self._numbers)), values)
        self._tell_of(trial)

    def on_trial_result(self, *_: Any, **info: Any) -> None:
        self._tell_of(info["trial"])

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:  # noqa: ARG002
        folder, last = self._folder(trial), trial.last_result["images_seen"]
        if last < self._plan.rungs[-1] and folder.failure is None:
            folder.stop()
        self._tell_of(trial, over=True)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:  # noqa: ARG002
        self._tell_of(trial, over=True, error=str(trial.get_error() or "lost"))

    def _folder(self, trial: Trial) -> TrialFolder:
        return TrialFolder.of(self._plan.trials, trial.config["values"])

    def _tell_of(self, trial: Trial, *, over: bool = False, error: str | None = None) -> None:
        record = self._folder(trial).record(last_rung=self._plan.rungs[-1])
        assert record is not None, "this process has started it"
        self._tell(record, over, error)
