"""What nothing in a store or its MLflow refers to any more, by class, and its deletion: `ncsn cleanup`.

A run refers to what its records and its config name. What a registered version needs stays, and so does all of an
active run, in which something has changed within a day. If MLflow does not answer or a record cannot be read, nothing
is found and so nothing is deleted. Imports no torch.
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ncsn import storage
from ncsn.config import ConfigError, from_yaml
from ncsn.data.format import MANIFEST
from ncsn.errors import UserError
from ncsn.inspection.listing import at_once, grouped
from ncsn.runs import layout
from ncsn.runs.layout import RUN_PATTERN, Store, begun
from ncsn.runs.results import IngestResult, Result, SearchResult, TrainResult
from ncsn.storage import Entry
from ncsn.tracking.client import client_at
from ncsn.tracking.deleted import delete_artifacts, deleted_artifacts, every_version, sampled_runs

CLASSES = {
    "temporary": "temporary files and cut uploads, a day old",
    "checkpoints": "checkpoints beyond train.keep_checkpoints",
    "samples": "samples and exports of runs without a registered version",
    "trials": "checkpoints of trials that lost",
    "features": "features of evaluations without a registered version",
    "datasets": "datasets without a run",
    "code": "archives of --code that no run names",
    "artifacts": "artifacts of deleted MLflow runs",
}
_QUIET_SECONDS = 86400.0  # a run whose pod waits for room changes nothing, and a stopped one may go on the next morning
_LOOK_SECONDS = 5.0  # between two looks for steps that have begun
_MARKERS = (MANIFEST, layout.INDEX, "reference.json")  # without its own, a folder is not complete
_Candidate = tuple[str, str, list[Entry]]  # what may go unless somebody refers to it: class, place and files


@dataclass(frozen=True)
class Leftover:
    """A file or folder that nothing refers to."""

    kind: str  # a key of CLASSES
    uri: str
    size: int  # bytes


def find_leftovers(root: str, registry: str) -> tuple[list[Leftover], dict[str, float]]:
    """What nothing refers to in a store and its MLflow, in the order of `CLASSES`; and what `begun` said before."""
    client, began = client_at(registry), begun(root)
    versions, sampled = every_version(client), sampled_runs(client, root)
    tags = [version.tags for version in versions]
    files = storage.list_entries(root, files=True)
    runs = {run: held for run, held in grouped(layout.OF_RUN, files).items() if RUN_PATTERN.fullmatch(run)}
    if began and not runs:  # A store whose disk with the runs is not mounted looks the same.
        hint = f"find them, or delete {Store(root).begun} if they are gone for good"
        raise UserError(Store(root).runs, "has none of the runs that have begun", hint=hint)
    records = dict(zip(runs, at_once(partial(_read, root), [*runs.values()]), strict=True))
    # By place the runs that name it, and those that name it or something in it; "" for versions.
    whole, named = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for who, said in [("", tags), *records.items()]:
        for path in map(PurePosixPath, re.findall(layout.NAMED, json.dumps(said))):
            whole[str(path)].add(who)
            for place in (path, *path.parents):
                named[str(place)].add(who)
    active = {run for run, when in began.items() if time.time() - when < _QUIET_SECONDS}
    active |= {run for run, held in runs.items() if not _is_quiet(held)}
    registered = {each.get("ncsn.run") for each in tags}
    registered |= {run for run in runs if _recorded(records[run], TrainResult).get("key", {}).get("model")}
    candidates = [("code", *each) for each in grouped(layout.ARCHIVE, files).items() if _is_quiet(each[1])]
    candidates += _cut([entry for entry in files if layout.run_of(entry.path) not in active])
    for run in runs.keys() - active:
        candidates += _surplus(root, runs[run])
        tuned = _recorded(records[run], SearchResult)
        trials = grouped(layout.OF_TRIAL, runs[run]) if tuned.get("state") == "FINISHED" else {}
        for checkpoints, held in trials.items():
            trial = storage.find_json(storage.join(root, checkpoints.rpartition("/")[0], "trial.json"))
            if trial is not None and trial["values"] != tuned["values"]["values"]:  # the search did not choose it
                candidates.append(("trials", checkpoints, held))
        if run in sampled and run not in registered:
            candidates += [("samples", *each) for each in grouped(layout.OF_SAMPLES, runs[run]).items()]
    # An active run may read any dataset until it has recorded its own.
    if all(_recorded(records.get(run, {}), IngestResult).get("values") for run in active):
        candidates += _of_datasets(files, named, active, tags)
    found = [
        Leftover(kind, storage.join(root, place), sum(entry.size for entry in held))
        for kind, place, held in candidates
        if not named[place] - ({layout.run_of(place)} if kind == "samples" else set())
        if not whole[layout.folder_of(place)] - {layout.run_of(place), ""}  # Another run reads the whole folder.
        # Not where a symbolic link below the root leads: others may use what is behind it.
        if not (storage.is_local(root) and Path(root, place).resolve() != Path(root).resolve() / place)
    ]
    found += [Leftover("artifacts", uri, size) for uri, size in deleted_artifacts(client, root, versions)]
    return sorted(found, key=lambda each: [*CLASSES].index(each.kind)), began


def delete_leftovers(
    root: str, registry: str, found: Iterable[Leftover], began: dict[str, float]
) -> Iterator[Leftover]:
    """Delete what was found, each as it is yielded; end as soon as a step begins, which may read any of it."""
    looked = -_LOOK_SECONDS
    for each in found:
        if each.kind == "artifacts":
            delete_artifacts(client_at(registry), each.uri)
            yield each
            continue
        # A step looks for a dataset as soon as it begins.
        if each.kind == "datasets" or time.monotonic() > looked + _LOOK_SECONDS:
            looked = time.monotonic()
            if begun(root) != began:
                return
        for marker in _MARKERS if each.kind != "temporary" else ():
            storage.delete(storage.join(each.uri, marker))
        storage.delete(each.uri)
        yield each


def _read(root: str, held: Iterable[Entry]) -> dict[str, Any]:
    """What a run has recorded, by the path of the file: of each step, and its config."""
    found = {place: storage.read_json(storage.join(root, place)) for place in grouped(layout.RECORD, held)}
    for place in grouped(layout.CONFIG, held):
        found[place] = storage.read_text(storage.join(root, place))
    return found


def _recorded(files: Mapping[str, Any], kind: type[Result]) -> dict[str, Any]:
    """What the files of a run have of a step: of its last attempt and of its last result."""
    ours = (said for place, said in files.items() if f"/steps/{kind.step}/" in place)
    return dict(pair for said in ours for pair in said.items())


def _cut(files: Sequence[Entry]) -> list[_Candidate]:
    """Temporary files, and what has no index, without which nothing reads it."""
    paths = {entry.path for entry in files}
    return [
        ("temporary", place, held)
        for pattern, marker in (
            (layout.TEMPORARY, ""),
            (layout.OF_CHECKPOINT, layout.INDEX),
            (layout.OF_DATASET, MANIFEST),
        )
        for place, held in grouped(pattern, files).items()
        if f"{place}/{marker}" not in paths and _is_quiet(held)
    ]


def _surplus(root: str, files: Sequence[Entry]) -> list[_Candidate]:
    """Checkpoints that training would have deleted."""
    paths, checkpoints = {entry.path for entry in files}, grouped(layout.OF_TRAINING, files)
    whole = [place for place in checkpoints if f"{place}/{layout.INDEX}" in paths]
    whole.sort(key=lambda place: int(place.rpartition("-")[2]))
    images = [place for place in whole if "/images-" in place]
    if not images:
        return []
    try:  # each has the setting of its time
        keep = from_yaml(storage.read_text(storage.join(root, images[-1], "config.yaml"))).train.keep_checkpoints
    except ConfigError:  # of another version of this program
        keep = "all"
    kept = images if keep == "all" else images[-keep:]
    before = whole[: whole.index(images[-1])]
    return [("checkpoints", place, checkpoints[place]) for place in before if place not in kept]


def _of_datasets(
    files: Sequence[Entry], named: Mapping[str, set[str]], active: set[str], tags: Sequence[Mapping[str, str]]
) -> Iterator[_Candidate]:
    """Datasets and features that no registered version and no active run needs."""
    # By digests and the beginnings of fingerprints, since the tags of a store that was moved have its old addresses.
    needed = {each.get("dataset.digest") for each in tags} | {each.get("eval.fingerprint", "")[:16] for each in tags}
    whole = grouped(rf"(.+)/{MANIFEST}", files)
    for place, held in grouped(layout.OF_DATASET, files).items():
        if place in whole and not named[place] and place.rpartition("/")[2] not in needed and _is_quiet(held):
            yield "datasets", place, held
    for place, held in grouped(layout.OF_FEATURES, files).items():
        users = named[place.rpartition("/reference/")[0]]  # without any, the dataset goes
        if users and not users & active and place.rpartition("/")[2] not in needed and _is_quiet(held):
            yield "features", place, held


def _is_quiet(entries: Iterable[Entry]) -> bool:
    """Whether nothing of this has changed for a day."""
    return time.time() - max(entry.changed for entry in entries) > _QUIET_SECONDS
