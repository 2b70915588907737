"""What nothing in a store or its MLflow refers to any more, by class, and its deletion: `ncsn cleanup`.

A run refers to what its records and its config name. What a registered version needs stays, and so does all of a run
on which somebody may be working. If MLflow does not answer or a record cannot be read, nothing is found and so nothing
is deleted. Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ncsn import storage
from ncsn.config import ConfigError, from_yaml
from ncsn.data.format import MANIFEST
from ncsn.errors import UserError
from ncsn.runs.folder import BEGUN, RUN_PATTERN, RUNS, RunFolder
from ncsn.runs.steps import TUNE
from ncsn.storage import Entry
from ncsn.tools.listing import DATASET, DATASETS, QUIET_SECONDS, at_once, begun, grouped
from ncsn.tracking.client import client_at
from ncsn.tracking.deleted import delete_artifacts, deleted_artifacts, every_version, knows_run

CLASSES = {
    "temporary": "temporary files and cut uploads, a day old",
    "checkpoints": "checkpoints beyond train.keep_checkpoints",
    "samples": "samples of runs without a registered version",
    "trials": "checkpoints of trials that lost",
    "features": "features of evaluations without a registered version",
    "datasets": "datasets without a run",
    "artifacts": "artifacts of deleted MLflow runs",
}
ABANDONED_SECONDS = 86400.0  # an ingestion that was stopped may go on with its temporary files the next morning
_LOOK_SECONDS = 5.0  # between two looks for runs that begin while others are deleted
_INDEX = "checkpoint.json"
_MARKERS = (MANIFEST, _INDEX, "reference.json")  # without its own, a folder is not complete
# A URI in a text, by what follows the root of the store; of one with such a word in its root, also the rest.
_NAMED = re.compile(rf"(?=(?<![\w-])((?:{RUNS}|{DATASETS})/[^\s\"'\\]+))")
_RECORD, _SAMPLES, _TRIAL = (
    r"(steps/[^/]+/step\.json)",
    r"(samples/[^/]+/[^/]+)/.+",
    r"(search/trials/[^/]+/[^/]+/checkpoints)/.+",
)
_CHECKPOINT = r"((?:.+/)?(?:checkpoints|ema|selected)/(?:images|resume)-\d+)/.+"
_FEATURES, _TEMPORARY = r"([^/]+/[^/]+/reference/[^/]+)/.+", rf"((?:.+?/)?(?:{storage.TEMPORARY}))(?:/.*)?"


@dataclass(frozen=True)
class Leftover:
    """A file or folder that nothing refers to."""

    kind: str  # a key of CLASSES
    uri: str
    size: int  # bytes


@dataclass
class _Run:
    name: str
    named: set[str]  # what it refers to
    working: bool
    mlflow: str = ""  # id of its MLflow run
    found: list[Leftover] = field(default_factory=list)  # what may go unless somebody refers to it


@dataclass
class Survey:
    """What nothing in a store refers to."""

    root: str
    registry: str  # URI of its MLflow
    begun: dict[str, float]  # of each run, before the search
    found: list[Leftover] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)  # runs with samples that this MLflow does not know: they stay

    def delete(self) -> Iterator[Leftover]:
        """Delete what was found, each as it is yielded, but nothing that a run may use which began meanwhile."""
        looked, now = -_LOOK_SECONDS, self.begun
        for each in self.found:
            if each.kind == "artifacts":
                delete_artifacts(client_at(self.registry), each.uri)
                yield each
                continue
            place, _, rest = each.uri.removeprefix(f"{self.root}/").partition("/")
            if place != RUNS or time.monotonic() > looked + _LOOK_SECONDS:  # any run may use a dataset
                looked, now = time.monotonic(), begun(self.root)
            run = rest.partition("/")[0]
            if now.get(run) == self.begun.get(run) if place == RUNS else now == self.begun:
                for marker in _MARKERS if each.kind != "temporary" else ():
                    storage.delete(storage.join(each.uri, marker))
                storage.delete(each.uri)
                yield each


class _References:
    """Which runs refer to what; the run of a registered version is the empty one."""

    def __init__(self) -> None:
        self._exact, self._inside = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)

    def add(self, owner: str, names: Iterable[str]) -> None:
        for name in names:
            self._exact[name].add(owner)
            for folder in _above(name):
                self._inside[folder].add(owner)

    def owners(self, name: str) -> set[str]:
        """The runs that name this, something in it, or a folder that it is in."""
        return self._exact[name].union(self._inside[name], *(self._exact[folder] for folder in _above(name)))


def _above(name: str) -> list[str]:
    """The folders of a store that it is in."""
    parts = name.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def survey(root: str, registry: str) -> Survey:
    """What nothing refers to in the store at `root` and in its MLflow, in the order of `CLASSES`."""
    client, result, references = client_at(registry), Survey(root, registry, begun(root)), _References()
    versions = every_version(client)
    # By names and digests, since the tags of a store that was moved have its old addresses.
    tags = [version.tags for version in versions]
    registered = {each.get("ncsn.run") for each in tags}
    needed = {each.get("dataset.digest", "") for each in tags} | {
        each.get("eval.fingerprint", "")[:16] for each in tags
    }
    tops = storage.list_entries(storage.join(root, RUNS))
    names = [top.path for top in tops if not top.is_file and RUN_PATTERN.fullmatch(top.path)]
    if result.begun and not names:  # so does a store look whose disk with the runs is away
        hint = f"find them, or delete {storage.join(root, BEGUN)} if they are gone for good"
        raise UserError(storage.join(root, RUNS), "has none of the runs that have begun", hint=hint)
    runs = at_once(partial(_look_at, root, result.begun), names)
    references.add("", _named(json.dumps(tags)))
    for run in runs:
        references.add(run.name, run.named)
    found = [*_abandoned(root, "", storage.list_entries(root)), *_abandoned(root, RUNS, tops)]
    for run in runs:
        foreign = None
        for each in run.found:
            owners = references.owners(each.uri.removeprefix(f"{root}/"))
            if owners - {run.name} or (owners and each.kind == "checkpoints"):
                continue
            if each.kind == "samples" and run.name in registered:
                continue
            if each.kind == "samples":
                foreign = not knows_run(client, run.mlflow) if foreign is None else foreign
                if foreign:
                    continue
            found.append(each)
        result.foreign += [run.name] if foreign else []
    found += _of_datasets(root, references, {run.name for run in runs if run.working}, needed)
    found += [Leftover("artifacts", uri, size) for uri, size in deleted_artifacts(client, root, versions)]
    kept = (each for each in found if not _is_linked(root, each.uri))
    result.found = sorted(kept, key=lambda each: [*CLASSES].index(each.kind))
    return result


def _of_datasets(root: str, references: _References, working: set[str], needed: set[str]) -> Iterator[Leftover]:
    """Datasets and features without a run or, by digests and the beginnings of fingerprints, a registered version."""
    files = storage.list_entries(storage.join(root, DATASETS), files=True)
    yield from _abandoned(root, DATASETS, files)
    features = grouped(_FEATURES, files)
    for name, held in grouped(DATASET, files).items():
        uri, owners = storage.join(root, DATASETS, name), references.owners(f"{DATASETS}/{name}")
        if f"{name}/{MANIFEST}" not in {entry.path for entry in held}:
            if _is_quiet(held, ABANDONED_SECONDS):
                yield _leftover("temporary", uri, held)
        elif not owners and name.partition("/")[2] not in needed:
            if _is_quiet(held):
                yield _leftover("datasets", uri, held)
        elif not owners & working:
            for place, of in features.items():
                if place.startswith(f"{name}/") and place.rpartition("/")[2] not in needed and _is_quiet(of):
                    yield _leftover("features", storage.join(root, DATASETS, place), of)


def _look_at(root: str, began: Mapping[str, float], name: str) -> _Run:
    """What a run refers to, and what may go of it."""
    folder = RunFolder(root, name)
    files = storage.list_entries(folder.uri, files=True)
    records: dict[str, Any] = {}
    for place in grouped(_RECORD, files):
        records[place.split("/")[1]] = storage.read_json(storage.join(folder.uri, place))
    texts = [json.dumps(record) for record in records.values()]
    if "config.yaml" in {entry.path for entry in files}:
        texts.append(storage.read_text(folder.config))
    working = not _is_quiet(files) or time.time() - began.get(name, 0.0) < QUIET_SECONDS
    run = _Run(name, {named for text in texts for named in _named(text)}, working)
    if run.working:
        run.named |= set() if records.get("ingest", {}).get("result") else {DATASETS}  # it may find any of them
        return run
    run.mlflow = next((each["mlflow"]["parent_run_id"] for each in records.values() if each["mlflow"]), "")
    run.found += _abandoned(folder.uri, "", files)
    run.found += _surplus(folder, files, trained=records.get("train", {}).get("state") == "FINISHED")
    for place, held in grouped(_SAMPLES, files).items():
        run.found.append(_leftover("samples", storage.join(folder.uri, place), held))
    tuned = records.get(TUNE, {})
    if tuned.get("state") == "FINISHED":
        for place, held in grouped(_TRIAL, files).items():
            uri = storage.join(folder.uri, place)
            trial = storage.find_json(storage.join(uri.rpartition("/")[0], "trial.json"))
            if trial is not None and trial["values"] != tuned["result"]["values"]:
                run.found.append(_leftover("trials", uri, held))
    return run


def _surplus(folder: RunFolder, files: list[Entry], *, trained: bool) -> Iterator[Leftover]:
    """Checkpoints that training would have deleted, and those without an index, which nothing reads."""
    groups, whole, resumes = grouped(_CHECKPOINT, files), list[tuple[int, str]](), list[tuple[int, str]]()
    for place, held in groups.items():
        kind, _, number = place.rpartition("-")
        if f"{place}/{_INDEX}" not in {entry.path for entry in held}:
            if _is_quiet(held, ABANDONED_SECONDS):
                yield _leftover("temporary", storage.join(folder.uri, place), held)
        elif kind == "checkpoints/images":
            whole.append((int(number), place))
        elif kind == "checkpoints/resume":
            resumes.append((int(number), place))
    if not whole:
        return
    whole.sort()
    newest, place = whole[-1]
    try:  # each has the setting of its time
        keep = from_yaml(storage.read_text(storage.join(folder.uri, place, "config.yaml"))).train.keep_checkpoints
    except ConfigError:  # of another version of this program
        keep = "all"
    passed = [each for number, each in resumes if trained or number < newest]
    for each in passed + [each for _, each in ([] if keep == "all" else whole[:-keep])]:
        yield _leftover("checkpoints", storage.join(folder.uri, each), groups[each])


def _abandoned(uri: str, place: str, entries: Iterable[Entry]) -> Iterator[Leftover]:
    """The temporary files among the entries of the folder `place` below `uri`."""
    for name, held in grouped(_TEMPORARY, entries).items():
        where = storage.join(uri, *filter(None, (place, name)))
        files = held if held[0].is_file else [*held, *storage.list_entries(where, files=True)]
        if _is_quiet(files, ABANDONED_SECONDS):
            yield _leftover("temporary", where, files)


def _is_linked(root: str, uri: str) -> bool:
    """Whether a symbolic link below the root leads there: others may use what is behind it."""
    inside = uri.removeprefix(f"{root}/")
    return storage.is_local(root) and inside != uri and os.path.realpath(uri) != f"{os.path.realpath(root)}/{inside}"


def _leftover(kind: str, uri: str, held: Iterable[Entry]) -> Leftover:
    return Leftover(kind, uri, sum(entry.size for entry in held))


def _is_quiet(entries: Iterable[Entry], seconds: float = QUIET_SECONDS) -> bool:
    """Whether nothing of this has changed for so long."""
    return time.time() - max((entry.changed for entry in entries), default=0.0) > seconds


def _named(text: str) -> set[str]:
    return set(_NAMED.findall(text))
