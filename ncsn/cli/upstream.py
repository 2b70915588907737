"""Finds what a step needs among the results of the earlier steps of its run."""

from __future__ import annotations

from collections.abc import Mapping

from ncsn import storage
from ncsn.cli.catalogue import BESIDE_THE_PIPELINE, CATALOGUE, OWN, Source
from ncsn.errors import UserError
from ncsn.runs.folder import RunFolder
from ncsn.runs.records import read_record


def find_inputs(folder: RunFolder, step: str, given: Mapping[str, str | None]) -> dict[str, str]:
    """URIs of all inputs of `step`: as given, else from the run; of those on demand only if given.

    Raises:
        UserError: if an earlier step has not finished.
    """
    found = {}
    info = {**CATALOGUE, **BESIDE_THE_PIPELINE}[step]
    asked = {name: source for name, source in info.on_demand.items() if given.get(name)}
    for name, source in {**info.inputs, **asked}.items():
        uri = given.get(name)
        found[name] = storage.absolute(uri) if uri and uri != OWN else _from_run(folder, step, name, source)
    return found


def _from_run(folder: RunFolder, step: str, name: str, source: Source) -> str:
    record = read_record(folder, source.step)
    if record is None:
        raise UserError(
            f"--{name}",
            f"{step} needs the {source.what}, and run {folder.run!r} has none yet",
            hint=f"run `ncsn {source.step}` with the same options first, or pass --{name} URI",
        )
    return str(record.result[source.field])
