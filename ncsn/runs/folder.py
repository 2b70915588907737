"""The folder of a run: its paths, and the claim of its name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ncsn import storage
from ncsn.config import Config, changed_settings, explain_changes, from_yaml, to_yaml
from ncsn.errors import UserError

RUN_PATTERN = re.compile(r"[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?")
_LEVELS = {"noise.sigma_1", "noise.sigma_L", "noise.num_levels"}


class ForeignRun(UserError):
    """The run belongs to another config."""


class _Below:
    """The URI of what has this name in a run's folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: RunFolder, owner: type[RunFolder]) -> str:
        return storage.join(folder.uri, self._name)


@dataclass(frozen=True)
class RunFolder:
    """The URIs of a run's files."""

    root: str
    run: str

    config = _Below("config.yaml")  # owns the name of the run
    status = _Below("status.json")  # how the run ended
    complete = _Below("complete.json")  # what the whole pipeline was done for
    steps = _Below("steps")  # the records of each step
    checkpoints = _Below("checkpoints")
    averages = _Below("ema")  # snapshots of two running averages, and averages put together from them
    history = _Below("history.json")  # the training curves
    previews = _Below("previews")  # images that training made of itself
    start = _Below("start")  # the weights that training starts from, if it starts from a trained network
    report = _Below("report")
    evaluation = _Below("evaluation")  # the metrics
    selection = _Below("selection")  # the scores of checkpoints and the choice among them
    selected = _Below("selected")  # copies of the checkpoints that were chosen
    search = _Below("search")  # a search and its result

    @property
    def uri(self) -> str:
        """The folder itself."""
        return storage.join(self.root, "runs", self.run)

    def preview(self, images_seen: int) -> str:
        """The preview at this many training images, a PNG file."""
        return storage.join(self.previews, f"images-{images_seen:09d}.png")

    def samples(self, checkpoint_digest: str, sampler_digest: str) -> str:
        """Folder of the images of one sampler and one checkpoint."""
        return storage.join(self.uri, "samples", checkpoint_digest, sampler_digest)

    def step(self, step: str, file: str) -> str:
        """A file of one step, `step.json`, `progress.json`, `lease` or `log.txt`."""
        return storage.join(self.steps, step, file)


def run_folder(config: Config, run: str) -> RunFolder:
    """The folder of `run` below `config.storage.root`."""
    # One name for a folder, a Ray job and an MLflow run.
    if not RUN_PATTERN.fullmatch(run):
        raise UserError(
            "--run",
            "not a valid name",
            hint="use 1 to 63 lower-case letters, digits, '-', '_' and '.', starting and ending with a letter or digit",
            value=run,
        )
    return RunFolder(root=storage.absolute(config.storage.root), run=run)


def claim_run(config: Config, run: str) -> RunFolder:
    """Claim the name of the run for this config; `ForeignRun` if it belongs to one that trains other weights."""
    folder, text = run_folder(config, run), to_yaml(config)
    if not storage.publish_once(folder.config, text.encode()) and (owner := storage.read_text(folder.config)) != text:
        require_owner(from_yaml(owner, origin=folder.config), config, run)
    return folder


def require_owner(owner: Config, config: Config, run: str) -> None:
    """Raise `ForeignRun`, with the first settings that differ, if the two configs train different weights."""
    if changed := changed_settings(owner, config):
        hint = "choose another --run NAME"
        if owner.noise.training.kind == "lognormal" and changed.keys() <= _LEVELS:
            hint += ", or sample at other levels with sampling.levels"
        raise ForeignRun("--run", f"belongs to another config: {explain_changes(changed)}", hint=hint, value=run)
