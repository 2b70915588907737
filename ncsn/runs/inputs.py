"""Where the inputs of a step come from: what somebody names, else the results of earlier steps of the run."""

from __future__ import annotations

from collections.abc import Mapping

from ncsn import storage
from ncsn.config import Config
from ncsn.errors import UserError
from ncsn.runs.folder import RunFolder
from ncsn.runs.records import read_result
from ncsn.runs.steps import OWN, STEP_INFO


def find_inputs(folder: RunFolder, step: str, given: Mapping[str, str | None], *, config: Config) -> dict[str, str]:
    """URIs of the inputs of a step: as given, else from the run; those on demand only if given."""
    info = STEP_INFO[step]
    asked = {name: source for name, source in info.on_demand.items() if given.get(name)}
    found = {}
    for name, source in {**info.inputs, **asked}.items():
        uri = given.get(name)
        if uri and uri != OWN:
            found[name] = storage.absolute(uri)
            continue
        record = read_result(folder, source.step)
        if record is None:
            raise UserError(
                f"--{name}",
                f"{step} needs the {source.what}, and run {folder.run!r} has none yet",
                hint=f"run `ncsn {source.step}` with the same options first, or pass --{name} URI",
            )
        found[name] = str(record.result[source.field])
        if source.selectable and not uri:
            found[name] = default_checkpoint(folder, config, last=found[name])
    return found


def default_checkpoint(folder: RunFolder, config: Config, *, last: str) -> str:
    """The checkpoint that `ncsn select` chose since training reached the `last` one of the run, else that one."""
    trained, chosen = read_result(folder, "train"), read_result(folder, "select")
    if trained is None or chosen is None or config.sampling.relative_width is not None:  # which asks for an average
        return last
    uri = str(chosen.result["checkpoint"])
    current = trained.result["checkpoint"] == last and trained.finished_at <= chosen.finished_at
    return uri if current and storage.exists(uri) else last
