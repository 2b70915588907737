"""Finds what a step needs among the results of the earlier steps of its run."""

from __future__ import annotations

from collections.abc import Mapping

from ncsn import storage
from ncsn.cli.catalogue import BESIDE_THE_PIPELINE, CATALOGUE, Source
from ncsn.cli.records import read_record
from ncsn.steps.result import RunFolder


def find_inputs(folder: RunFolder, step: str, given: Mapping[str, str | None]) -> dict[str, str]:
    """URIs of all inputs of `step`: as given, else from the run.

    Raises:
        ValueError: if an earlier step has not finished; the message says which to run.
    """
    found = {}
    for name, source in {**CATALOGUE, **BESIDE_THE_PIPELINE}[step].inputs.items():
        uri = given.get(name)
        found[name] = storage.absolute(uri) if uri else _from_run(folder, step, name, source)
    return found


def _from_run(folder: RunFolder, step: str, name: str, source: Source) -> str:
    record = read_record(folder, source.step)
    if record is None:
        raise ValueError(
            f"{step} needs the {source.what}, and run {folder.run!r} has none yet; "
            f"run `ncsn {source.step}` with the same options first, or give --{name} URI"
        )
    return str(record.result[source.field])
