"""Where everything lies in a store, and what a run holds: its name's owner, a record of each step, cost and end.

A step may run in another process or on another machine than the command that waits for it, so all of this travels
through the store. Each step has one record, `step.json`. One process writes it at a time: the driver of the step while
it works, else the launcher whose job the backend has accepted.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock, Timeout

from ncsn import storage
from ncsn.config import Config, changed_settings, decay_begins, explain_changes, flatten, from_yaml, to_yaml
from ncsn.config.load import ADDRESSES
from ncsn.environment import KFP_RUN_ID, utc_now
from ncsn.errors import Problem, UserError, problems_of, shown_value
from ncsn.events import tell
from ncsn.runs.steps import OWN, SEARCH, STEP_TABLE, STEPS, STEPS_BY_WORKERS, steps_of
from ncsn.storage.heartbeat import LeaseExpired, is_abandoned
from ncsn.storage.retry import limited

DEFAULT_ROOT: str = Config.model_fields["storage"].default.root  # the store if no option names one
RUN_PATTERN = re.compile(r"[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?")
INDEX = "checkpoint.json"  # of a checkpoint, written last
RESUME = "resume-"  # instead of `images-`, of a checkpoint that is only to resume from
BEFORE_DECAY = "before-decay-"  # of one that `train.continue_from` reads
_CHECKPOINT = re.compile(rf"(images-|{RESUME})\d+")
State = Literal["", "RUNNING", "FINISHED", "FAILED", "KILLED"]  # as in MLflow; empty before the first attempt
STOPPED: dict[type[BaseException], str] = {SystemExit: "terminated", KeyboardInterrupt: "interrupted"}
_LEVELS = {"noise.sigma_1", "noise.sigma_L", "noise.num_levels"}


class ForeignRun(UserError):
    """The run belongs to another config, has read other images, or a job does the step with other inputs."""


@dataclass(frozen=True)
class _Below:
    """The URI of what has this name in a folder."""

    name: str

    def __get__(self, folder: Any, owner: type) -> str:
        return storage.join(folder.uri, self.name)


@dataclass(frozen=True)
class Store:
    """What lies at the root of a store."""

    uri: str

    runs = _Below("runs")
    begun = _Below("begun")  # for each run an empty file with the date of the last beginning of a step
    datasets = _Below("datasets")  # by source and digest
    code = _Below("code")  # the archives of `--code`, by their digest


def folder_name(images_seen: int, kind: str = "images-") -> str:
    return f"{kind}{images_seen:09d}"


def images_seen_at(name: str) -> int:
    """The training images that the checkpoint of this name has seen."""
    return int(name.rpartition("-")[2])


def checkpoint_names(uri: str) -> list[str]:
    """The names of the checkpoints in a folder, also of the rest of an upload that was cut short; the oldest first."""
    return sorted(filter(_CHECKPOINT.fullmatch, storage.list_names(uri)), key=images_seen_at)


def resumable(uri: str) -> Iterator[str]:
    """The complete ones, also one that is only to resume from; the newest first."""
    return (name for name in reversed(checkpoint_names(uri)) if storage.exists(storage.join(uri, name, INDEX)))


def checkpoint_facts(folder: Path, origin: str) -> dict[str, Any]:
    """The `state.json` of a checkpoint, which others may have made; `UserError` if it names no dataset."""
    facts: dict[str, Any] = storage.read_json(str(folder / "state.json"))
    if not storage.DIGEST.fullmatch(given := str(facts["dataset_digest"])):  # it becomes the name of a folder
        raise UserError(origin, f"its dataset_digest is {shown_value(given)}, which is no digest")
    return facts


def said_newest(uri: str) -> str:
    """The newest of them in words: a name, or what can be said without one."""
    try:
        with limited(0):
            return next(resumable(uri), "the start")
    except OSError:
        return "its last checkpoint"


def addresses(config: Config) -> list[str]:
    """The --set for the addresses of a config, which a command does not take from a record."""
    named = {path: value for path, value in flatten(config).items() if path in ADDRESSES and value is not None}
    return [f"--set {shlex.quote(f'{path}={value}')}" for path, value in named.items()]


class _Trained:
    """The URIs of what a training leaves in its folder."""

    checkpoints = _Below("checkpoints")
    selected = _Below("selected")  # copies of the checkpoints that were chosen
    hung = _Below("hung")  # stacks of workers that hung


@dataclass(frozen=True)
class TrainingFolder(_Trained):
    """The folder of a run, or of a trial of a search."""

    uri: str


@dataclass(frozen=True)
class RunFolder(_Trained):
    """The URIs of a run's files."""

    root: str
    run: str

    config = _Below("config.yaml")  # owns the name of the run
    status = _Below("status.json")  # how the run ended
    steps = _Below("steps")  # the records of each step
    samples = _Below("samples")  # by the checkpoint's digest and the sampler's
    history = _Below("history.json")  # the training curves
    previews = _Below("previews")  # images that training made of itself
    start = _Below("start")  # the weights that training starts from, if it starts from a trained network
    guides = _Below("guides")  # copies of the networks that guide samples
    report = _Below("report")
    exports = _Below("exports")  # data sets of generated images
    evaluation = _Below("evaluation")  # the metrics
    selection = _Below("selection")  # the scores of checkpoints and the choice among them
    search = _Below("search")  # a search and its result
    utility = _Below("utility")  # the answers of classifiers, and the comparison

    @property
    def uri(self) -> str:
        return storage.join(Store(self.root).runs, self.run)

    @classmethod
    def of(cls, uri: str) -> RunFolder | None:
        """The run that something is in, whether or not it is there."""
        found = re.fullmatch(rf"(.+)/runs/({RUN_PATTERN.pattern})(/.*)?", uri)
        return cls(found[1], found[2]) if found else None

    def options(self, config: Config) -> str:
        """The options by which a command finds this run from here; the config names the addresses to ask."""
        settings = [] if self.root == storage.absolute(DEFAULT_ROOT) else [f"storage.root={self.root}"]
        return " ".join([f"--run {self.run}", *(f"--set {shlex.quote(each)}" for each in settings), *addresses(config)])

    @property
    def begun(self) -> str:
        """An empty file, whose date is that of the last beginning of a step: runs are listed by it."""
        # Beside the runs, since S3 gives the dates of a folder's files with their names, and of its folders none.
        return storage.join(Store(self.root).begun, self.run)

    def preview(self, images_seen: int) -> str:
        """The preview at this many training images, a PNG file."""
        return storage.join(self.previews, f"images-{images_seen:09d}.png")

    def step(self, step: str, file: str) -> str:
        """A file of one step, such as `step.json`, `progress.json`, `stop`, `log.txt` or `refused-<KFP run>`."""
        return storage.join(self.steps, step, file)


def begun(root: str) -> dict[str, float]:
    """Run -> when one of its steps last began, by the clock of the store."""
    return {entry.path: entry.changed for entry in storage.list_entries(Store(root).begun)}


def run_folder(config: Config, run: str) -> RunFolder:
    """The folder of `run` below `config.storage.root`."""
    # One name for a folder, a Ray job and an MLflow run.
    if not RUN_PATTERN.fullmatch(run):
        hint = "use 1 to 63 lower-case letters, digits, '-', '_' and '.', starting and ending with a letter or digit"
        raise UserError("--run", "not a valid name", hint=hint, value=run)
    return RunFolder(root=storage.absolute(config.storage.root), run=run)


def run_of(path: str) -> str:
    """The run that a path below the root belongs to; empty for other paths."""
    return path.split("/")[1] if path.startswith("runs/") else ""


def folder_of(path: str) -> str:
    """The path of the folder of that run."""
    return f"runs/{run_of(path)}"


# Files of a store by the place that they belong to, which is the first group.
OF_RUN = r"runs/([^/]+)/.+"
CONFIG = r"(runs/[^/]+/config\.yaml)"
RECORD = r"(runs/[^/]+/steps/[^/]+/step\.json)"
OF_CHECKPOINT = r"(runs/.+/(?:checkpoints|selected)/(?:images|resume|before-decay)-\d+)/.+"
OF_TRAINING = r"(runs/[^/]+/checkpoints/(?:images|resume)-\d+)/.+"
OF_SAMPLES = r"(runs/[^/]+/(?:samples|exports))/.+"
OF_TRIAL = r"(runs/[^/]+/search/trials/[^/]+/[^/]+/checkpoints)/.+"
DATASET = r"([^/.][^/]*/[^/.]+)/.+"  # below `Store.datasets`
OF_DATASET = rf"(datasets/{DATASET.removeprefix('(')}"
OF_FEATURES = r"(datasets/[^/]+/[^/]+/reference/[^/]+)/.+"
ARCHIVE = r"(code/[^/.]+\.zip)"
TEMPORARY = rf"((?:.+?/)?(?:{storage.TEMPORARY}))(?:/.*)?"
# A URI in a text, by what follows the root of the store; of one with such a word in its root, also the rest.
NAMED = r"(?=(?<![\w-])((?:runs|datasets|code)/[^\s\"'\\]+))"


@dataclass
class Run:
    """A run, and the config that a command has for it. Its name belongs to the first config that claims it."""

    config: Config
    name: str
    checkpoint: str | None = None  # URI, if that of an address is meant instead of the run's own
    claimed: bool = False
    images: Mapping[str, Any] | None = None  # the key of the first step, once its images are known to be the run's

    def __post_init__(self) -> None:
        self.folder = run_folder(self.config, self.name)

    def claim(self) -> None:
        """Claim the name; `ForeignRun` if it belongs to a config that trains other weights."""
        storage.make_store(self.folder.root)
        text, place = to_yaml(self.config), self.folder.config
        if not storage.publish_once(place, text.encode()) and (owner := storage.read_text(place)) != text:
            require_owner(from_yaml(owner, origin=place), self.config, self.name)
        storage.write_bytes(self.folder.begun, b"")
        self.claimed = True

    @property
    def owner(self) -> Config:
        """The config that the name belongs to."""
        return from_yaml(storage.read_text(self.folder.config), origin=self.folder.config)

    def alone(self) -> AbstractContextManager[object]:
        """A lock, so that one process at a time trains the run; `UserError` if another one does."""
        # The kernel frees it when its process ends, however it ends. A store that is not local has none.
        if not storage.is_local(self.folder.uri):
            return nullcontext()
        storage.make_store(self.folder.root)
        path = Path(self.folder.uri) / ".lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return FileLock(path, is_singleton=True).acquire(timeout=0)  # which this process may have already
        except Timeout:
            hint = "wait for it, or choose another --run NAME"
            raise UserError("--run", "running in another process", hint=hint, value=self.name) from None


def require_owner(owner: Config, config: Config, run: str) -> None:
    """Raise `ForeignRun`, with the first settings that differ, if the two configs train different weights."""
    if changed := changed_settings(owner, config):
        hint = "choose another --run NAME"
        if owner.noise.training.kind == "lognormal" and changed.keys() <= _LEVELS:
            hint += ", or sample at other levels with sampling.levels"
        if changed.keys() <= {"train.num_images", "optimizer.decay_images"}:
            train = config.train.model_copy(update={"continue_from": run})
            with suppress(UserError):  # it has no state for that
                state_to_continue(config.model_copy(update={"train": train}))
                hint += f", with train.continue_from={run} to begin where the learning rate of this one fell"
        raise ForeignRun("--run", f"belongs to another config: {explain_changes(changed)}", hint=hint, value=run)


def state_to_continue(config: Config) -> str:
    """URI of the checkpoint that `train.continue_from` means; `UserError` if there is none, or not for this config."""
    key, run, length = "train.continue_from", str(config.train.continue_from), config.train.num_images
    folder = RunFolder(storage.absolute(config.storage.root), run)
    if not (RUN_PATTERN.fullmatch(run) and storage.exists(folder.config)):
        raise UserError(key, f"no run of this name in {folder.root}", hint="`ncsn ls` lists them", value=run)
    owner = from_yaml(storage.read_text(folder.config), origin=folder.config)
    seen = decay_begins(owner) or 0
    state = storage.join(folder.checkpoints, folder_name(seen, BEFORE_DECAY))
    if not storage.exists(storage.join(state, INDEX)):
        where = f"at {seen:,} images" if seen else f"none, of {owner.optimizer.decay} decay and {owner.loss.kind} loss"
        hint = "train it up to there, or use train.init_from" if seen else "use train.init_from"
        raise UserError(key, f"has no checkpoint where a linear decay begins: {where}", hint=hint, value=run)
    free = (key, "name", "train.num_images", "optimizer.decay_images", "train.ema.")
    changed = {path: each for path, each in changed_settings(owner, config).items() if not path.startswith(free)}
    if (old := owner.train.averaging) != (new := config.train.averaging):  # which may depend on the length
        changed["train.ema"] = (vars(old), vars(new))
    if changed:
        reason = f"was trained with another config: {explain_changes(changed)}"
        raise UserError(key, reason, hint="change the length alone", value=run)
    if (begins := decay_begins(config) or 0) < seen:
        reason = f"the decay begins at {begins:,} images, before the state of {run!r}, at {seen:,}"
        raise UserError("train.num_images", reason, hint="raise it, or lower optimizer.decay_images", value=length)
    return state


@dataclass(frozen=True)
class StepError:
    """Why a step failed."""

    kind: str
    message: str
    problems: tuple[Problem, ...] = ()  # of a user's mistake
    kfp_run: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


@dataclass(frozen=True)
class StepRecord:
    """The last attempt of a step, and the result of the last one that finished."""

    state: State = ""
    error: StepError | None = None  # of the last attempt
    seconds: float = 0.0  # of all attempts, without those that were killed
    reads: Mapping[str, str] = field(default_factory=dict)  # URIs of the inputs of the last attempt
    mlflow: Mapping[str, str] = field(default_factory=dict)  # run_id and parent_run_id of its MLflow run
    inputs: Mapping[str, Any] = field(default_factory=dict)  # of the result
    result: Mapping[str, Any] = field(default_factory=dict)  # empty if none has finished
    finished_at: str = ""
    request: str = ""  # of the launcher whose driver worked last, see `RemoteStep.request`; "" if none


def read_step(folder: RunFolder, step: str) -> StepRecord:
    record = storage.absolute_uris(storage.find_json(folder.step(step, "step.json")) or {}, folder.root)
    if error := record.get("error"):
        record["error"] = StepError(**error | {"problems": tuple(map(Problem.from_json, error["problems"]))})
    return StepRecord(**record)


def update_step(folder: RunFolder, step: str, **changes: Any) -> None:
    record = replace(read_step(folder, step), **changes)
    error = record.error and vars(record.error) | {"problems": [each.to_json() for each in record.error.problems]}
    values = storage.relative_uris(vars(record) | {"error": error}, folder.root)
    storage.write_json(folder.step(step, "step.json"), values, indent=1)


def opened_from(folder: RunFolder) -> str:
    """The registered version, models:/NAME/VERSION, that was opened as this run; empty for a run that is trained."""
    return str(read_step(folder, "train").inputs.get("model", ""))


def folders_of(folder: RunFolder, config: Config) -> dict[str, RunFolder]:
    """Step -> the folder of its run. The best trial of a search is trained as another run, which the search names."""
    if config.search is None or not read_step(folder, SEARCH).state:
        return dict.fromkeys((step for step in steps_of(config) if step != SEARCH), folder)
    found = replace(folder, run=read_step(folder, SEARCH).result.get("run", folder.run))
    return {step: folder if step in (STEPS[0], SEARCH) else found for step in steps_of(config)}


def read_results(folders: Mapping[str, RunFolder]) -> dict[str, StepRecord]:
    """The records of the steps that have finished in these folders."""
    records = {step: read_step(folder, step) for step, folder in folders.items()}
    return {step: record for step, record in records.items() if record.result}


def has_other_job(folder: RunFolder, step: str, record: StepRecord, request: str | None) -> bool:
    """Whether a job for another request works on the step; one whose launcher is gone does not."""
    other = record.state == "RUNNING" and record.request not in ("", request)
    return other and not is_abandoned(folder.step(step, f"lease/{record.request}"))


def record_failure(
    folder: RunFolder, step: str, error: BaseException, *, before: StepRecord, request: str | None
) -> None:
    """Record what ended an attempt of the step, whose record was `before`, unless more is known already.

    `request` is that of the attempt, None if it has begun nothing. A job that goes on for another one keeps its record.
    """
    try:
        now, state = read_step(folder, step), state_after(error)
        if has_other_job(folder, step, now, request):
            return
        message = STOPPED.get(type(error)) or str(error)
        # What the driver elsewhere wrote says more than what its launcher saw, unless it was only told to end, for a
        # reason that the launcher knows, or the launcher repeats it and says more.
        stronger = (
            now.error in (None, before.error)
            or (now.state, state) == ("KILLED", "FAILED")
            or (now.error.message != message and now.error.message in message)
        )
        idle = type(error) in STOPPED and now.state == "FINISHED"  # no work has begun since
        if stronger and now.finished_at == before.finished_at and not idle:
            kfp_run = os.environ.get(KFP_RUN_ID, "")
            record = StepError(type(error).__name__, message, problems_of(error), kfp_run)
            update_step(folder, step, state=state, error=record, request=request or "")
    except OSError as failure:  # a full disk must not hide the first error
        error.add_note(f"(the error could not be recorded in the store: {failure})")


def state_after(error: BaseException) -> State:
    return "FAILED" if isinstance(error, Exception) and not isinstance(error, LeaseExpired) else "KILLED"


@dataclass(frozen=True)
class Outcome:
    """How the last pipeline of a run ended."""

    status: str  # FINISHED, FAILED or KILLED, as in MLflow
    reason: str = ""
    failed_step: str | None = None

    def __str__(self) -> str:
        return f"{self.failed_step}: {self.reason}" if self.failed_step else self.reason


def write_outcome(folder: RunFolder, outcome: Outcome, *, closed: bool = False) -> None:
    """Publish how the run ended; `closed` if no task follows, which is told once."""
    before = storage.find_json(folder.status) or {}
    storage.write_json(folder.status, asdict(outcome) | {"finished_at": utc_now(), "closed": closed}, indent=1)
    if closed and not (before.get("closed") and before["status"] == outcome.status):
        facts = {"step": outcome.failed_step or "", "status": outcome.status, "reason": outcome.reason}
        tell("finished" if outcome.status == "FINISHED" else "failed", run=folder.run, root=folder.root, **facts)


def write_end(config: Config, folders: Sequence[RunFolder], step: str, error: BaseException) -> None:
    """Make the error of a step in the last of the runs the outcome of all; a finished run that is stopped keeps its."""
    with suppress(OSError):  # an unreachable store must not hide the first error
        told = read_step(folders[-1], step).error  # by the driver, perhaps, who knew more
        outcome = Outcome(state_after(error), told.message if told else STOPPED.get(type(error), str(error)), step)
        steps = folders_of(folders[0], config).items()
        if outcome.status == "KILLED" and all(read_step(of, each).state == "FINISHED" for each, of in steps):
            outcome = Outcome("FINISHED")  # no step has begun to work again
        for folder in folders:
            write_outcome(folder, outcome)


def read_outcome(folder: RunFolder) -> Outcome | None:
    """How the last pipeline of the run ended; None if it has not ended or never started. A single step leaves it."""
    record = storage.find_json(folder.status)
    return None if record is None else Outcome(record["status"], record["reason"], record["failed_step"])


def find_inputs(folder: RunFolder, step: str, given: Mapping[str, str | None]) -> dict[str, str]:
    """URIs of the inputs of a step: as given, else from the run; those on demand only if given."""
    info = STEP_TABLE[step]
    asked = {name: source for name, source in info.on_demand.items() if given.get(name)}
    found = {}
    for name, source in {**info.inputs, **asked}.items():
        uri = given.get(name)
        if uri and uri != OWN:
            found[name] = storage.absolute(uri)
            continue
        record = read_step(folder, source.step)
        if not record.result:
            reason = f"{step} needs the {source.what}, and run {folder.run!r} has none yet"
            hint = f"run `ncsn {source.step}` with the same options first, or pass --{name} URI"
            raise UserError(f"--{name}", reason, hint=hint)
        found[name] = str(record.result[source.field])
        if source.selectable and not uri:
            found[name] = default_checkpoint(folder, last=found[name])
    return found


def default_checkpoint(folder: RunFolder, *, last: str) -> str:
    """The checkpoint that `ncsn select` chose since training reached the `last` one of the run, else that one."""
    trained, chosen = read_step(folder, "train"), read_step(folder, "select")
    if not trained.result or not chosen.result:
        return last
    uri = str(chosen.result["checkpoint"])
    current = trained.result["checkpoint"] == last and trained.finished_at <= chosen.finished_at
    return uri if current and storage.exists(uri) else last


class Cost(NamedTuple):
    """Some seconds on reserved cores and GPUs."""

    seconds: float
    cpu_hours: float
    gpu_hours: float


def cost_of(config: Config, step: str, seconds: float) -> Cost:
    compute = config.compute
    workers = compute.max_workers if step in STEPS_BY_WORKERS else 1
    gpus = workers if compute.use_gpu and step in STEPS_BY_WORKERS else 0
    hours = seconds / 3600
    return Cost(seconds, workers * compute.cpus_per_worker * hours, gpus * hours)


def total_cost(costs: Iterable[Cost]) -> Cost:
    return Cost(*(sum(amounts) for amounts in zip(Cost(0.0, 0.0, 0.0), *costs, strict=True)))


def spent(config: Config, folder: RunFolder) -> dict[str, Cost]:
    """The cost of each step of a run so far, failed attempts included."""
    seconds = {step: read_step(folder, step).seconds for step in steps_of(config) if step != SEARCH}
    return {step: cost_of(config, step, value) for step, value in seconds.items() if value}
