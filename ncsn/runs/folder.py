"""The folder of a run: its paths, and the claim of its name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ncsn import storage
from ncsn.config import Config, changed_settings, from_yaml, to_yaml
from ncsn.errors import UserError

STEPS = ("ingest", "train", "sample", "evaluate", "register", "report")
RUN_PATTERN = re.compile(r"[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?")
_LEVELS = {"noise.sigma_1", "noise.sigma_L", "noise.num_levels"}


class ForeignRun(UserError):
    """The run belongs to another config."""


@dataclass(frozen=True)
class RunFolder:
    """The URIs of a run's files."""

    root: str
    run: str

    @property
    def uri(self) -> str:
        """The folder itself."""
        return storage.join(self.root, "runs", self.run)

    @property
    def config(self) -> str:
        """The config that owns the name of the run."""
        return storage.join(self.uri, "config.yaml")

    @property
    def checkpoints(self) -> str:
        """Folder of the checkpoints."""
        return storage.join(self.uri, "checkpoints")

    @property
    def averages(self) -> str:
        """Folder of the snapshots of two running averages, and of averages put together from them."""
        return storage.join(self.uri, "ema")

    @property
    def history(self) -> str:
        """The file of the training curves."""
        return storage.join(self.uri, "history.json")

    @property
    def previews(self) -> str:
        """Folder of the images that training made of itself."""
        return storage.join(self.uri, "previews")

    def preview(self, images_seen: int) -> str:
        """The preview at this many training images, a PNG file."""
        return storage.join(self.previews, f"images-{images_seen:09d}.png")

    @property
    def start(self) -> str:
        """Folder of the weights that training starts from, if it starts from a trained network."""
        return storage.join(self.uri, "start")

    @property
    def report(self) -> str:
        """Folder of the report."""
        return storage.join(self.uri, "report")

    @property
    def evaluation(self) -> str:
        """Folder of the metrics."""
        return storage.join(self.uri, "evaluation")

    @property
    def selection(self) -> str:
        """Folder of the scores of checkpoints and the choice among them."""
        return storage.join(self.uri, "selection")

    @property
    def selected(self) -> str:
        """Folder of copies of the checkpoints that were chosen."""
        return storage.join(self.uri, "selected")

    @property
    def search(self) -> str:
        """Folder of a search and its result."""
        return storage.join(self.uri, "search")

    def samples(self, checkpoint_digest: str, sampler_digest: str) -> str:
        """Folder of the images of one sampler and one checkpoint."""
        return storage.join(self.uri, "samples", checkpoint_digest, sampler_digest)

    def step(self, step: str, file: str) -> str:
        """A file of one step: `result.json`, `error.json`, `progress.json` or `spent.json`."""
        return storage.join(self.uri, "steps", step, file)


def run_folder(config: Config, run: str) -> RunFolder:
    """The folder of `run` below `config.storage.root`."""
    # One name for a folder, a Ray job and an MLflow run.
    if not RUN_PATTERN.fullmatch(run):
        raise UserError(
            "--run",
            "is not a valid name",
            hint="use 1 to 63 lower-case letters, digits, '-', '_' and '.', starting and ending with a letter or digit",
            value=run,
        )
    return RunFolder(root=storage.absolute(config.storage.root), run=run)


def claim_run(config: Config, run: str) -> RunFolder:
    """Claim the name of the run for this config; `ForeignRun` if it belongs to one that trains other weights."""
    folder = run_folder(config, run)
    if storage.publish_once(folder.config, to_yaml(config).encode()):
        return folder
    owner = from_yaml(storage.read_text(folder.config), origin=folder.config)
    require_owner(owner, config, run)
    return folder


def require_owner(owner: Config, config: Config, run: str) -> None:
    """Raise `ForeignRun`, with the first settings that differ, if the two configs train different weights."""
    changed = changed_settings(owner, config)
    if changed:
        shown = "; ".join(f"{path} is {old!r} there and {new!r} here" for path, (old, new) in list(changed.items())[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        hint = "choose another --run NAME"
        if owner.noise.training.kind == "lognormal" and changed.keys() <= _LEVELS:
            hint += ", or sample at other levels with sampling.levels"
        raise ForeignRun("--run", f"belongs to another config: {shown}{more}", hint=hint, value=run)
