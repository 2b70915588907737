"""Where everything lies in a store: the names of folders and files, and of what is in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncsn import storage
from ncsn.config import Config, flatten
from ncsn.config.load import ADDRESSES
from ncsn.errors import UserError, shown_value
from ncsn.storage.retry import limited

DEFAULT_ROOT: str = Config.model_fields["storage"].default.root  # the store if no option names one
RUN_PATTERN = re.compile(r"[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?")
INDEX = "checkpoint.json"  # of a checkpoint, written last
RESUME = "resume-"  # instead of `images-`, of a checkpoint that is only to resume from
BEFORE_DECAY = "before-decay-"  # of one that `train.continue_from` reads
_CHECKPOINT = re.compile(rf"(images-|{RESUME})\d+")


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
        """A file of one step, such as `attempt.json`, `result.json`, `progress.json`, `stop` or `log.txt`."""
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
RECORD = r"(runs/[^/]+/steps/[^/]+/(?:attempt|result)\.json)"
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
