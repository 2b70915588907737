"""What a store and its registry hold, the newest first: runs, datasets and models, as `ncsn ls` and `ncsn show` say it.

Only the newest are looked into. Imports no torch.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from heapq import nlargest
from typing import TypeVar

from ncsn import storage
from ncsn.config.schema import MODEL_NAME_PATTERN, SCHEME
from ncsn.data.format import MANIFEST, load_manifest
from ncsn.errors import UserError
from ncsn.progress import read_progress
from ncsn.runs.layout import DATASET, RUN_PATTERN, RunFolder, Store
from ncsn.runs.record import finished_steps, read_attempt, read_finished, read_outcome
from ncsn.runs.results import EvaluateResult
from ncsn.runs.steps import STEP_TABLE
from ncsn.storage import Entry
from ncsn.tracking.client import client_at
from ncsn.tracking.gate import Decision
from ncsn.tracking.promotion import DECISION, resolve_version, whole_number

MOST = 50  # of the newest that are listed
_QUIET_SECONDS = 3600.0  # without a change for so long, nobody works on a run: it renews a lease and its progress
_AT_ONCE = 16  # requests to the store
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Item:
    """A run, a dataset or a version of a model."""

    kind: str
    name: str  # for `ncsn show`
    state: str
    size: int  # bytes
    changed: float  # seconds since 1970: the last change of a file, or when the version was made
    figures: str  # a line
    facts: Mapping[str, str] = field(default_factory=dict)  # for `ncsn show`


def at_once(call: Callable[[T], R], each: Sequence[T]) -> list[R]:
    """The results of calls to the store, in their order."""
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return list(threads.map(call, each))


def list_runs(root: str) -> tuple[list[Item], int]:
    """The newest runs, and the number of all."""
    held, dated = at_once(storage.list_entries, [Store(root).runs, Store(root).begun])
    dates = {entry.path: entry.changed for entry in held if not entry.is_file and RUN_PATTERN.fullmatch(entry.path)}
    dates |= {entry.path: entry.changed for entry in dated if entry.path in dates}

    def describe(run: str) -> Item:
        try:
            return describe_run(root, run)
        except storage.UnreadableError as error:  # the other runs are there all the same
            uri = RunFolder(root, run).uri
            return Item("run", run, "UNREADABLE", 0, dates[run], str(error), {"uri": uri})

    newest = at_once(describe, nlargest(MOST, dates, key=dates.__getitem__))
    return sorted(newest, key=lambda item: -item.changed), len(dates)


def describe_run(root: str, run: str) -> Item:
    """A run by its last step, and by its evaluation if it has one."""
    folder = RunFolder(root, run)
    files = {entry.path: entry for entry in storage.list_entries(folder.uri, files=True)}
    changed = max((entry.changed for entry in files.values()), default=0.0)

    def below(step: str, file: str) -> str:
        return folder.step(step, file).removeprefix(f"{folder.uri}/")

    places = {step: below(step, "attempt.json") for step in STEP_TABLE}
    records = [(files[place].changed, step) for step, place in places.items() if place in files]
    state, figures, facts = "NEW", "", {"uri": folder.uri}  # nothing was begun yet
    if records:
        last, step = max(reversed(records), key=lambda pair: pair[0])  # of one second in S3, the later step
        attempt = read_attempt(folder, step)
        state = f"{attempt.state or state} {step}"
        if attempt.error is not None:
            facts["error"] = attempt.error.message
        if attempt.state == "RUNNING" and time.time() - changed > _QUIET_SECONDS:
            state = f"LOST {step}"  # its process cannot say so
        ended = files.get("status.json")
        if ended is not None and (outcome := read_outcome(folder)) is not None:
            end = " ".join(filter(None, (outcome.status, outcome.failed_step)))
            # A single step may have begun after the pipeline.
            state = end if ended.changed >= last or state == end else f"{end}; {step} {state.split()[0]}"
        if below(EvaluateResult.step, "result.json") in files:
            step = EvaluateResult.step
        if (finished := read_finished(folder, step)) is not None:
            figures = str(finished)
        elif attempt.error is not None:
            figures = " ".join(attempt.error.message.split())
        elif progress := read_progress(folder.step(step, "progress.json")):
            figures = f"{progress.done:,} / {progress.total:,} {progress.unit}"
    return Item("run", run, state, sum(entry.size for entry in files.values()), changed, figures, facts)


def grouped(pattern: str, entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The entries by the first group of the pattern, which their paths match."""
    groups = defaultdict[str, list[Entry]](list)
    for entry in entries:
        if match := re.fullmatch(pattern, entry.path):
            groups[match[1]].append(entry)
    return groups


def list_datasets(root: str, wanted: str = "") -> tuple[list[Item], int]:
    """The newest datasets whose digest begins with `wanted` or that have this name or URI, and the number of all."""
    place = Store(root).datasets
    wanted = wanted.removeprefix(f"{place}/")
    groups = {
        name: files
        for name, files in grouped(DATASET, storage.list_entries(place, files=True)).items()
        if name == wanted or name.partition("/")[2].startswith(wanted)
    }

    def describe(name: str) -> Item:
        uri, files = storage.join(place, name), groups[name]
        size, changed = sum(entry.size for entry in files), max(entry.changed for entry in files)
        if f"{name}/{MANIFEST}" not in {entry.path for entry in files}:
            return Item("dataset", name, "INCOMPLETE", size, changed, "", {"uri": uri})
        try:
            manifest = load_manifest(uri)
        except (UserError, storage.UnreadableError) as error:  # of another version, or damaged
            return Item("dataset", name, "UNREADABLE", size, changed, str(error), {"uri": uri})
        counts = " + ".join(f"{count:,} {split}" for split, count in manifest.counts.items())
        facts = {"uri": uri, "source": manifest.source, "license": manifest.license}
        return Item("dataset", name, "COMPLETE", size, changed, f"{counts} images of {manifest.pixels}", facts)

    newest = nlargest(MOST, groups, key=lambda name: max(entry.changed for entry in groups[name]))
    return at_once(describe, newest), len(groups)


def list_models(registry: str, wanted: str = "") -> list[Item]:
    """The newest versions that `ncsn register` has made: of all models, or of one; or the one with this address."""
    client, items = client_at(registry), list[Item]()
    if "/" in wanted or "@" in wanted:
        versions = [resolve_version(client, wanted)]
    else:
        query = "tags.`ncsn.model` LIKE '%'" + (f" and name = '{wanted}'" if wanted else "")
        versions = client.search_model_versions(query, MOST, ["creation_timestamp DESC"])
    # A search does not fill in the aliases.
    models = {name: client.get_registered_model(name) for name in dict.fromkeys(each.name for each in versions)}
    for version in versions:
        written, named = version.tags.get(DECISION), sorted(models[version.name].aliases.items())
        decision = Decision.from_json(written) if written else None
        aliases = [alias for alias, of in named if str(of) == str(version.version)]
        measured = decision.evidence.measurement if decision and decision.evidence else None
        item = Item(
            kind="model",
            name=f"{SCHEME}{version.name}/{version.version}",
            state=", ".join([*aliases, *(["waits"] if decision and decision.waits else [])]) or "-",
            size=whole_number(version.tags.get("ncsn.bytes", "")),
            changed=version.creation_timestamp / 1000,
            figures=f"{measured.name} = {measured}" if measured else "",
            facts={
                "run": version.tags.get("ncsn.run", ""),
                "store": version.tags.get("ncsn.root", ""),
                "gate": decision.reason if decision else "",
            },
        )
        items.append(item)
    return items


def find_items(root: str, registry: str, name: str) -> list[Item]:
    """The run, datasets and versions of a model that have this name; with one version also its run, if it is here."""
    items = _find_run(root, name)
    if re.fullmatch(r"(.*/)?[0-9a-f]{8,64}", name):
        items += list_datasets(root, name)[0]
    if match := re.fullmatch(rf"({SCHEME})?{MODEL_NAME_PATTERN}(?P<version>/\d+|@[^/@:]+)?", name):
        versions = list_models(registry, name)
        items += versions
        if match["version"] and versions[0].facts["store"] == root:
            items += _find_run(root, versions[0].facts["run"])
    return items


def _find_run(root: str, name: str) -> list[Item]:
    """The run of this name with a line for each step that has a result, if there is such a run."""
    folder = RunFolder(root, name)
    if not (RUN_PATTERN.fullmatch(name) and storage.exists(folder.config)):
        return []
    run, facts = describe_run(root, name), dict[str, str]()
    for step, finished in finished_steps(dict.fromkeys(STEP_TABLE, folder)).items():
        facts[step] = f"{finished}; {finished.seconds:,.1f} s"
    return [replace(run, facts={**run.facts, **facts})]
