"""The moment at which `noise: auto` becomes noise levels."""

from __future__ import annotations

from ncsn import storage
from ncsn.config import Config, from_yaml, to_yaml
from ncsn.data.format import Manifest
from ncsn.data.statistics import resolve_noise
from ncsn.runs.folder import require_owner, run_folder


def settle_noise(config: Config, run: str, manifest: Manifest) -> Config:
    """The config with the levels that `noise: auto` stands for, which then are the run's.

    Raises:
        UserError: if they cannot be chosen, or are not those that the run has.
    """
    folder = run_folder(config, run)
    settled = resolve_noise(config, manifest)
    owner = from_yaml(storage.read_text(folder.config), origin=folder.config)
    require_owner(resolve_noise(owner, manifest), settled, run)
    if owner.noise != settled.noise:
        storage.write_text(folder.config, to_yaml(owner.model_copy(update={"noise": settled.noise})))
    return settled
