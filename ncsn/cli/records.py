"""What the steps of a run left in the store, as plain dicts: results, progress, errors, and the mark of a whole run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ncsn import storage
from ncsn.config import Config, to_json
from ncsn.runs.folder import RunFolder
from ncsn.runs.records import StepRecord, existing_json, stored_records

_COMPLETE = "complete.json"


def mark_complete(folder: RunFolder, config: Config) -> dict[str, StepRecord]:
    """Note that this config's whole pipeline stands in the run's folder; the records of its steps."""
    records = stored_records(folder)
    mark = {
        "of": _circumstances(config),
        "finished_at": {step: record.finished_at for step, record in records.items()},
    }
    storage.write_text(storage.join(folder.uri, _COMPLETE), json.dumps(mark, indent=1))
    return records


def complete_records(folder: RunFolder, config: Config) -> dict[str, StepRecord] | None:
    """The records of a pipeline that ran to its end with this very config, if nothing was changed or lost since."""
    mark = existing_json(storage.join(folder.uri, _COMPLETE))
    if mark is None or mark["of"] != _circumstances(config):
        return None
    records = stored_records(folder)
    if {step: record.finished_at for step, record in records.items()} != mark["finished_at"]:
        return None
    outputs = (uri for record in records.values() for uri in _uris(record.result, folder.root))
    return records if all(storage.exists(uri) for uri in outputs) else None


def _circumstances(config: Config) -> dict[str, str]:
    """What a whole run's results depend on besides each other."""
    from ncsn.data.listing import source_fingerprint
    from ncsn.tracking.client import shown, tracking_uri

    return {
        "config": to_json(config),
        "files": source_fingerprint(config.data),
        "registry": shown(tracking_uri(config)),
    }


def _uris(result: Mapping[str, Any], root: str) -> Iterator[str]:
    return (value for value in result.values() if isinstance(value, str) and value.startswith(f"{root}/"))
